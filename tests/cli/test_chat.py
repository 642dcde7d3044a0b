"""`chat`: a conversation, its lines and keys given by a script."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import pytest

from jaxserve.cli.chat import GREETING, MAX_TOKENS, _limited, converse
from jaxserve.errors import DeviceFailure, InvalidRequest
from jaxserve.offline import LLM, Piece
from tests.cli.conftest import CONFIG, Run, wanted
from tests.fakes.cli import open_fake
from tests.fakes.engine import MAX_CONTEXT

OPTIONS = {"seed": 3, "max_tokens": 12}
CTRL_C = KeyboardInterrupt
CTRL_D = EOFError


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`types("hi", CTRL_C, …)`: what comes from the keyboard, Ctrl-D at the end."""

    def types(*keys: str | BaseException | type[BaseException]) -> None:
        coming = iter([*keys, CTRL_D])

        def read(prompt: str) -> str:
            assert prompt == "> "
            key = next(coming)
            if isinstance(key, str):
                return key
            raise key

        monkeypatch.setattr(builtins, "input", read)

    return types


def rendered(*turns: str, system: str = "") -> str:
    """The prompt of a conversation that begins with the user."""
    messages = [("system", system)] if system else []
    messages += [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    said = (f"<|im_start|>{role}\n{turn}<|im_end|>" for role, turn in messages)
    return "".join(said) + "<|im_start|>assistant\n"


def idle(llm: LLM) -> bool:
    """Whether the engine has nothing left to do."""
    while (status := llm._client.get_status()).running or status.waiting:
        pass
    return status.pages_used == 0


def talk(llm: LLM, capsys: pytest.CaptureFixture[str], system: str = "", **options: Any) -> str:
    """What was written after the greeting."""
    assert converse(llm, system, options) == 0
    out = capsys.readouterr().out
    assert out.startswith(GREETING)
    return out.removeprefix(GREETING)


def test_it_remembers_what_was_said(
    llm: LLM, types: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    types("hi", "  and then? ", "")
    first = wanted(rendered("hi"), **OPTIONS)
    second = wanted(rendered("hi", first, "and then?"), **OPTIONS)
    assert talk(llm, capsys, **OPTIONS) == f"{first}\n{second}\n\n"


def test_reset_forgets_all_but_the_system_message(
    llm: LLM, types: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    types("hi", "/reset", "ho")
    first = wanted(rendered("hi", system="be kind"), **OPTIONS)
    second = wanted(rendered("ho", system="be kind"), **OPTIONS)
    assert talk(llm, capsys, "be kind", **OPTIONS) == f"{first}\n{second}\n\n"


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(
    llm: LLM, types: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, heard = llm.stream, [""]

    def interrupted(messages: Any, **options: Any) -> Iterator[Piece]:
        pieces = stream(messages, **options)
        if len(messages) > 1:
            return pieces

        def until_ctrl_c() -> Iterator[Piece]:
            try:
                while len(heard[0]) < 20:
                    piece = next(pieces)
                    heard[0] += piece.text
                    yield piece
                raise KeyboardInterrupt
            finally:
                pieces.close()

        return until_ctrl_c()

    monkeypatch.setattr(llm, "stream", interrupted)
    types("hi", "go on")
    out = talk(llm, capsys, seed=3)
    cut = heard[0]
    assert cut and wanted(rendered("hi"), seed=3, max_tokens=MAX_TOKENS).startswith(cut)
    after = wanted(rendered("hi", cut, "go on"), seed=3, max_tokens=MAX_TOKENS)
    assert out == f"{cut} …\n{after}\n\n"
    assert idle(llm)


def test_ctrl_c_before_the_first_word(
    llm: LLM, types: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream

    def interrupted(messages: Any, **options: Any) -> Iterator[Piece]:
        if len(messages) == 1:
            raise KeyboardInterrupt
        return stream(messages, **options)

    monkeypatch.setattr(llm, "stream", interrupted)
    types("hi", "ho")
    after = wanted(rendered("hi", "", "ho"), **OPTIONS)
    assert talk(llm, capsys, **OPTIONS) == f" …\n{after}\n\n"


def test_ctrl_c_at_the_prompt_leaves_the_line(
    llm: LLM, types: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    types(CTRL_C, "hi")
    answer = wanted(rendered("hi"), **OPTIONS)
    assert talk(llm, capsys, **OPTIONS) == f"\n{GREETING}{answer}\n\n"


def test_a_line_that_is_not_unicode_is_left_out(
    llm: LLM, types: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    types("\udcff", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "hi")
    first, second, answer = talk(llm, capsys, **OPTIONS).split("\n", 2)
    assert first.startswith("(the text is not Unicode") and "/reset" not in first
    assert second == "(that was not UTF-8)"
    assert answer == wanted(rendered("hi"), **OPTIONS) + "\n\n"


def test_what_is_too_long_is_left_out(
    llm: LLM, types: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    types("w" * MAX_CONTEXT, "hi")
    said, rest = talk(llm, capsys, **OPTIONS).split("\n", 1)
    assert said.startswith("(the prompt has ") and said.endswith("; /reset begins again)")
    assert rest == wanted(rendered("hi"), **OPTIONS) + "\n\n"


def test_an_answer_is_never_longer_than_the_context_has_left(llm: LLM) -> None:
    messages = [{"role": "user", "content": "w" * 3000}]
    left = MAX_CONTEXT - len(llm.tokenizer.encode(rendered("w" * 3000)))
    assert _limited(llm, messages, {}) == {"max_tokens": left}
    assert _limited(llm, messages, {"max_tokens": 5000, "seed": 1})["max_tokens"] == left
    assert _limited(llm, messages, {"max_tokens": 5}) == {"max_tokens": 5}
    short = [{"role": "user", "content": "hi"}]
    assert _limited(llm, short, {}) == {"max_tokens": MAX_TOKENS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 1, got -1"),
        ({"stop": [""]}, "stop takes non-empty strings"),
    ],
)
def test_wrong_options_are_refused_at_once(
    llm: LLM, types: Any, options: dict[str, Any], message: str
) -> None:
    types("hi")
    with pytest.raises(InvalidRequest, match=message):
        converse(llm, "", options)


def test_a_model_without_a_template_is_refused_at_once(
    run: Run, llm: LLM, types: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "template", None)
    types("hi")
    ended = run("chat")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == (
        "jaxserve: this model has no chat template; give model.chat_template a file\n"
    )


def test_a_dead_engine_ends_it(types: Any) -> None:
    types("hi", "ho")
    with open_fake(CONFIG) as broken:
        broken._engine.engine.executor.fail_at = 3
        with pytest.raises(DeviceFailure):
            converse(broken, "", {"ignore_eos": True})


def test_from_the_command_line(run: Run, types: Any) -> None:
    types("hi")
    ended = run("chat", "--system", "be kind", "--seed", 3, "--max-tokens", 12)
    answer = wanted(rendered("hi", system="be kind"), **OPTIONS)
    assert ended == (0, f"{GREETING}{answer}\n\n", "")
