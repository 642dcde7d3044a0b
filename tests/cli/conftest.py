"""The command line in this process, over the fake engine where it opens a model."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from jaxserve import cli
from jaxserve.config import Config, SchedulerConfig
from jaxserve.offline import LLM
from jaxserve.types import SamplingParams
from tests.fakes.cli import open_fake
from tests.fakes.engine import oracle
from tests.fakes.tokenizer import ByteTokenizer

CONFIG = Config(scheduler=SchedulerConfig(max_rows=4, max_step_tokens=64))
TOKENIZER = ByteTokenizer()


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str


class Terminal(io.TextIOWrapper):
    """A stream of somebody who sits there."""

    def isatty(self) -> bool:
        return True


Run = Callable[..., Ended]


def wanted(prompt: str | list[int], choice: int = 0, **sampling: Any) -> str:
    """The text that the fake engine answers with."""
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    params = SamplingParams(**({"max_tokens": 256} | sampling))
    return TOKENIZER.decode(oracle(ids, params, choice))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """One fake model for a file's tests."""
    with open_fake(CONFIG) as llm:
        yield llm


class _Lent:
    """The shared model as a command has it: leaving does not close it."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def __enter__(self) -> LLM:
        return self._llm

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def run(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("generate", "hi", stdin=b"…")` runs one command to its end."""
    monkeypatch.setattr(cli, "_open", lambda config: _Lent(llm))

    def run(*words: object, stdin: bytes | io.TextIOWrapper | None = b"") -> Ended:
        given = io.TextIOWrapper(io.BytesIO(stdin)) if isinstance(stdin, bytes) else stdin
        monkeypatch.setattr(sys, "stdin", given)
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        return Ended(status, *capsys.readouterr())

    return run
