"""The two trained adapters beside the embedded model through the whole server, with `openai`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.server.conftest import Server
from tests.training.adapters import ADAPTERS
from tests.training.test_adapters import PIRATE, QUESTIONS, is_json

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"


def ask(client: OpenAI, model: str, question: str) -> tuple[str, str]:
    """The greedy answer, streamed, and why it ended."""
    text, reason = "", ""
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0,
        stream=True,
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
    return text, reason


def test_base_and_adapters_in_one_batch(server: Server, client: OpenAI) -> None:
    """By the adapter's name, behind the base's, and found under the root; nothing is compiled."""
    models = (MODEL, "pirate", f"{MODEL}:pirate", "json")
    asked = [(model, question) for question in QUESTIONS[:4] for model in models]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = dict(zip(asked, pool.map(lambda a: ask(client, *a), asked), strict=True))
    for question in QUESTIONS[:4]:
        base, pirate, behind, (terse, reason) = (found[model, question] for model in models)
        assert not PIRATE.search(base[0]) and not is_json(base[0])
        assert len(PIRATE.findall(pirate[0])) >= 2, pirate
        assert len(PIRATE.findall(behind[0])) >= 2, behind
        assert is_json(terse) and reason == "stop", terse
    parents = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert parents["pirate"] == parents["json"] == MODEL and parents[MODEL] is None
    assert server.metrics()["jaxserve_compiles_after_warmup"] == 0


def test_loaded_reloaded_and_unloaded(server: Server, client: OpenAI) -> None:
    def post(action: str, **body: object) -> httpx.Response:
        return httpx.post(f"{server.base_url}/v1/{action}_lora_adapter", json=body, timeout=60)

    question = QUESTIONS[4]
    with pytest.raises(NotFoundError, match="mine"):
        ask(client, "mine", question)
    assert post("load", lora_name="mine", lora_path=str(ADAPTERS / "json")).status_code == 200
    assert is_json(ask(client, "mine", question)[0])
    again = {"lora_name": "mine", "lora_path": str(ADAPTERS / "pirate")}
    assert post("load", **again).status_code == 400
    assert post("load", **again, load_inplace=True).status_code == 200
    text, _ = ask(client, "mine", question)
    assert len(PIRATE.findall(text)) >= 2, text
    assert post("unload", lora_name="mine").status_code == 200
    with pytest.raises(NotFoundError, match="mine"):
        ask(client, "mine", question)


def test_a_cut_off_file_is_refused(server: Server, client: OpenAI, tmp_path: Path) -> None:
    for file in (ADAPTERS / "json").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BadRequestError, match="adapter_model.safetensors"):
        client.post(
            "/load_lora_adapter",
            body={"lora_name": "cut", "lora_path": str(tmp_path)},
            cast_to=httpx.Response,
        )
    with pytest.raises(NotFoundError):
        ask(client, "cut", QUESTIONS[0])
