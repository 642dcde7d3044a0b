"""LLM with LoRA adapters, by name and by directory, over a fake engine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import Config, LoraConfig, SchedulerConfig
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import AdapterNotFound, InvalidAdapter, InvalidRequest
from jaxserve.formats.peft import WEIGHTS_FILE, adapter_digest, write_adapter
from jaxserve.offline import LLM
from jaxserve.text.answer import Generation
from jaxserve.text.request import Request
from jaxserve.types import SamplingParams
from tests.fakes.engine import MODULES, fake_parts, oracle
from tests.fakes.tokenizer import ByteTokenizer
from tests.lora.adapters import random_adapter

MODULE = next(iter(MODULES)).replace("*", "0")
PROMPT = list(range(10, 30))


def written(directory: Path, seed: int, rank: int = 4) -> str:
    """An adapter's files; returns its key."""
    write_adapter(directory, random_adapter({MODULE: (8, 8)}, rank, seed))
    return adapter_digest(directory)


def answer(adapter: str | None, prompt: list[int] = PROMPT) -> list[int]:
    """What must come with the adapter of this key."""
    return oracle(prompt, SamplingParams(max_tokens=8, seed=0), adapter=adapter)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With two adapters, and a root with a third."""
    written(tmp_path / "one", 1)
    written(tmp_path / "two", 2)
    written(tmp_path / "root" / "three", 3)
    return tmp_path


def start(**lora: Any) -> LLM:
    """With two slots."""
    config = Config(
        scheduler=SchedulerConfig(max_rows=4, max_step_tokens=64),
        lora=LoraConfig(**{"enabled": True, "classes": ("4x2",)} | lora),
    )
    return LLM.over(EngineThread(config, fake_parts), config, ByteTokenizer())


@pytest.fixture
def llm(directory: Path) -> Iterator[LLM]:
    """One that knows the first by name, and the root."""
    names = (f"first={directory / 'one'}",)
    with start(adapters=names, root=str(directory / "root")) as made:
        yield made


def tokens(llm: LLM, adapter: str | Path | None) -> list[int]:
    """Of one prompt."""
    return llm.generate(PROMPT, max_tokens=8, seed=0, adapter=adapter)[0].token_ids


def test_by_name_from_the_root_and_by_directory(llm: LLM, directory: Path) -> None:
    one, two = adapter_digest(directory / "one"), adapter_digest(directory / "two")
    three = adapter_digest(directory / "root" / "three")
    assert len({tuple(answer(key)) for key in (None, one, two, three)}) == 4
    assert tokens(llm, None) == answer(None)
    assert tokens(llm, "first") == tokens(llm, directory / "one") == answer(one)
    assert tokens(llm, directory / "two") == tokens(llm, str(directory / "two")) == answer(two)
    assert tokens(llm, "three") == answer(three)


def test_each_prompt_its_own(llm: LLM, directory: Path) -> None:
    """In one batch, more of them than there are slots."""
    names = ["first", None, str(directory / "two"), "three"] * 5
    keys = {
        "first": adapter_digest(directory / "one"),
        None: None,
        str(directory / "two"): adapter_digest(directory / "two"),
        "three": adapter_digest(directory / "root" / "three"),
    }
    prompts = [[*PROMPT, place] for place in range(len(names))]
    answers = llm.generate(prompts, max_tokens=8, seed=0, adapter=names)
    for prompt, name, made in zip(prompts, names, answers, strict=True):
        assert made.token_ids == answer(keys[name], prompt)
    with pytest.raises(InvalidRequest, match="2 for 3 prompts"):
        llm.generate([[1], [2], [3]], adapter=["first", None])


def test_a_stream(llm: LLM, directory: Path) -> None:
    pieces = list(llm.stream(PROMPT, max_tokens=8, seed=0, adapter=directory / "two"))
    found = [token for piece in pieces for token in piece.token_ids]
    assert found == answer(adapter_digest(directory / "two"))


def test_a_directory_that_changes_is_another_adapter(llm: LLM, directory: Path) -> None:
    """Its name by content, and none of its cached KV."""
    old = adapter_digest(directory / "two")
    assert tokens(llm, directory / "two") == answer(old)
    new = written(directory / "two", 9)
    assert new != old
    assert tokens(llm, directory / "two") == answer(new)
    shutil.rmtree(directory / "two")
    with pytest.raises(InvalidAdapter, match="no directory"):
        tokens(llm, directory / "two")


def test_what_is_no_adapter(llm: LLM, directory: Path) -> None:
    with pytest.raises(AdapterNotFound, match=r"'four': it is neither .* \(first\)"):
        tokens(llm, "four")
    with pytest.raises(AdapterNotFound):
        tokens(llm, str(directory / "four"))
    (directory / "two" / WEIGHTS_FILE).unlink()
    with pytest.raises(InvalidAdapter, match="is missing"):
        tokens(llm, directory / "two")
    written(directory / "two", 2, rank=8)
    with pytest.raises(InvalidAdapter, match="rank 8"):
        tokens(llm, directory / "two")
    with pytest.raises(InvalidRequest, match="a name or a directory"):
        llm.generate("x", adapter=5)


def test_a_wrong_one_harms_no_other(llm: LLM) -> None:
    """In a stream of requests, each with a result of its own."""
    requests = [
        Request(prompt=PROMPT, max_tokens=8, seed=0, adapter=name)
        for name in ("first", "four", None, "first")
    ]
    results = dict(llm.run(requests))
    assert isinstance(results.pop(1), AdapterNotFound)
    assert len(results) == 3
    assert all(isinstance(result, Generation) for result in results.values())


def test_the_example_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/lora.md, with a fake engine and an adapter that fits it."""
    page = (Path(__file__).parents[1] / "docs" / "lora.md").read_text()
    (example,) = re.findall(r"^```python\n(from jaxserve import .*?)^```", page, re.M | re.S)
    written(tmp_path / "my-adapter", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxserve.LLM", lambda lora__enabled, classes: start(), raising=False)
    exec(example, {})
    assert len(capsys.readouterr().out) > 2
