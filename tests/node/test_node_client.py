"""The official `openai` client for Node against a server over the fake engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 120
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="needs Node: apt install nodejs npm"),
    pytest.mark.skipif(
        not (HERE / "node_modules" / "openai").is_dir(),
        reason="needs the Node client: npm ci --prefix tests/node",
    ),
]


@pytest.fixture
def base_url() -> Iterator[str]:
    """A server process on a free port."""
    command = [sys.executable, "-m", "tests.fakes.serve", "http.port=0", "model.max_context=256"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent.parent
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready on http"), process.communicate()
        yield line.split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT_S)


def test_node_client(base_url: str) -> None:
    assert NODE is not None
    with httpx.Client(base_url=base_url, timeout=TIMEOUT_S) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        done = subprocess.run(
            [NODE, "client.mjs", f"{base_url}/v1", model],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)

        request = {
            "model": model,
            "messages": [{"role": "user", "content": "Say héllo 👋"}],
            "max_tokens": 12,
            "seed": 7,
            "ignore_eos": True,
        }
        answer = http.post("/v1/chat/completions", json=request).json()
        text = answer["choices"][0]["message"]["content"]
        assert said["models"] == [model]
        for usage in (said["chat"]["usage"], answer["usage"]):
            del usage["prompt_tokens_details"]  # the second one finds the first one's prompt
        assert said["chat"] == {"text": text, "usage": answer["usage"], "finish": "length"}
        assert said["streamed"]["text"] == text
        assert said["streamed"]["roles"] == ["assistant"]
        assert said["streamed"]["finish"] == "length"
        assert said["streamed"]["usage"]["completion_tokens"] == 12
        assert len(said["completions"]) == 4
        assert len(set(said["completions"])) == 4
        assert said["errors"]["unknownModel"] == {
            "status": 404,
            "code": "model_not_found",
            "param": "model",
        }
        assert said["errors"]["badTemperature"]["status"] == 400
        assert said["errors"]["badTemperature"]["param"] == "temperature"
        assert http.get("/ready").status_code == 200
