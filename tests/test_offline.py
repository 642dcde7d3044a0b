"""LLM over a fake engine in a thread: batches, streams, stop strings, errors."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import offline
from jaxserve.config import Config, SchedulerConfig
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import (
    ConfigError,
    ContextTooLong,
    DeviceFailure,
    GrammarError,
    InvalidRequest,
    JaxserveError,
)
from jaxserve.offline import LLM
from jaxserve.settings import settings_of
from jaxserve.text.answer import Generation
from jaxserve.text.request import Request
from jaxserve.text.template import ChatTemplate
from jaxserve.types import SamplingParams
from tests.fakes.engine import MAX_CONTEXT, VOCAB_SIZE, fake_parts, oracle
from tests.fakes.tokenizer import CHAT_TEMPLATE, ByteTokenizer

TOKENIZER = ByteTokenizer()
CONFIG = Config(scheduler=SchedulerConfig(max_rows=4, max_step_tokens=64))


def start(config: Config = CONFIG, template: ChatTemplate | None = None) -> LLM:
    return LLM.over(EngineThread(config, fake_parts), config, TOKENIZER, template)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with start(template=ChatTemplate(CHAT_TEMPLATE)) as llm:
        yield llm


def wanted(prompt: str | list[int], choice: int = 0, **sampling: Any) -> list[int]:
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return oracle(ids, SamplingParams(**({"max_tokens": 256} | sampling)), choice)


def idle(llm: LLM) -> bool:
    """Whether nothing runs, waits or holds pages at the engine."""
    while (status := llm._client.get_status()).running or status.waiting:
        pass
    return status.pages_used == 0


def test_a_batch_comes_in_the_order_of_its_prompts(llm: LLM) -> None:
    prompts = [f"prompt number {i} " * (i % 5 + 1) for i in range(30)]
    answers = llm.generate(prompts, max_tokens=20, seed=1)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = wanted(prompt, max_tokens=20, seed=1)
        assert answer.token_ids == ids
        assert answer.text == TOKENIZER.decode(ids)
        assert answer.finish_reason == ("length" if len(ids) == 20 else "stop")
        assert answer.prompt == prompt
        assert answer.prompt_token_ids == TOKENIZER.encode(prompt)
    assert idle(llm)


def test_one_prompt_may_be_text_or_token_ids(llm: LLM) -> None:
    by_text = llm.generate("abc", seed=3)
    by_ids = llm.generate([97, 98, 99], seed=3)
    by_lists = llm.generate([[97, 98, 99], [97]], seed=3)
    assert len(by_text) == len(by_ids) == 1
    assert by_text[0].token_ids == by_ids[0].token_ids == by_lists[0].token_ids
    assert by_lists[1].token_ids == wanted([97], seed=3)
    assert by_ids[0].prompt is None


def test_token_ids_may_be_arrays(llm: LLM) -> None:
    options = {"seed": 3, "max_tokens": 5}
    ids = [wanted([97, 98], **options), wanted([99, 100], **options)]
    rows = np.array([[97, 98], [99, 100]])
    for prompts in (rows, list(rows)):
        assert [answer.token_ids for answer in llm.generate(prompts, **options)] == ids
    assert llm.generate(rows[0], **options)[0].token_ids == ids[0]
    assert llm.generate([], **options) == []


def test_max_tokens_is_256_or_what_is_left(llm: LLM) -> None:
    assert len(llm.generate("x", ignore_eos=True)[0].token_ids) == 256
    nearly_full = [65] * (MAX_CONTEXT - 7)
    assert len(llm.generate(nearly_full, ignore_eos=True)[0].token_ids) == 7


def test_choices_are_drawn_independently(llm: LLM) -> None:
    (answer,) = llm.generate("abc", n=3, seed=5, max_tokens=9, logprobs=1, prompt_logprobs=0)
    for index, choice in enumerate(answer.choices):
        assert choice.token_ids == wanted("abc", index, seed=5, max_tokens=9)
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        assert all(len(entry.top) == 1 for entry in choice.logprobs)
    assert [entry.token_id for entry in answer.prompt_logprobs] == [98, 99]


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    first, second = llm.generate(["abc", "abc"], max_tokens=20, ignore_eos=True)
    assert first.token_ids != second.token_ids


def test_a_stop_string_ends_its_choice_only(llm: LLM) -> None:
    ids = wanted("abc", seed=7, ignore_eos=True)
    texts = [TOKENIZER.token_bytes(token) for token in ids]
    stop_at = next(
        i for i in range(5, 100) if texts[i].startswith(b" w") and texts[i] not in texts[:i]
    )
    stop = texts[stop_at].decode()[1:]
    (answer,) = llm.generate("abc", seed=7, ignore_eos=True, stop=stop, logprobs=0)
    assert answer.finish_reason == "stop"
    assert answer.token_ids == ids[: stop_at + 1]
    assert len(answer.choices[0].logprobs) == stop_at + 1
    whole = TOKENIZER.decode(ids)
    assert answer.text == whole[: whole.index(stop)]
    (kept,) = llm.generate("abc", seed=7, ignore_eos=True, stop=[stop], include_stop=True)
    assert kept.text == whole[: whole.index(stop)] + stop
    assert idle(llm)


def test_conversations_go_through_the_template(llm: LLM) -> None:
    first = [{"role": "user", "content": "hi"}]
    second = [*first, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]
    rendered = "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    (alone,) = llm.chat(first, seed=1, max_tokens=5)
    assert alone.prompt == rendered
    assert alone.token_ids == wanted(rendered, seed=1, max_tokens=5)
    together = llm.chat([first, second], seed=1, max_tokens=5)
    assert together[0].token_ids == alone.token_ids
    assert "assistant\nho<|im_end|>" in (together[1].prompt or "")


def test_a_stream_brings_the_same_in_pieces(llm: LLM) -> None:
    (whole,) = llm.generate("abc", seed=2, ignore_eos=True, max_tokens=60)
    pieces = list(llm.stream("abc", seed=2, ignore_eos=True, max_tokens=60))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
    messages = [{"role": "user", "content": "hi"}]
    streamed = "".join(piece.text for piece in llm.stream(messages, seed=1, max_tokens=5))
    assert streamed == llm.chat(messages, seed=1, max_tokens=5)[0].text


def test_a_stream_that_is_left_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("abc", max_tokens=4000, ignore_eos=True)
    next(stream)
    assert llm._client.get_status().pages_used != 0
    stream.close()
    assert idle(llm)


def test_two_streams_may_be_read_in_turn(llm: LLM) -> None:
    a, b = (llm.stream(text, seed=1, max_tokens=30, ignore_eos=True) for text in ("a", "b"))
    texts = {"a": "", "b": ""}
    texts["a"] += next(a).text
    texts["b"] += next(b).text
    for name, stream in (("b", b), ("a", a)):
        texts[name] += "".join(piece.text for piece in stream)
        assert texts[name] == llm.generate(name, seed=1, max_tokens=30, ignore_eos=True)[0].text


def test_run_gives_each_request_its_own_result(llm: LLM) -> None:
    def requests() -> Iterator[Request]:
        for i in range(50):
            yield Request(prompt="" if i % 7 == 3 else f"p{i}", max_tokens=3 + i % 11, seed=i)

    results = dict(llm.run(requests()))
    assert sorted(results) == list(range(50))
    for index, result in results.items():
        if index % 7 == 3:
            assert isinstance(result, InvalidRequest) and "empty" in result.message
        else:
            assert isinstance(result, Generation)
            assert result.token_ids == wanted(f"p{index}", max_tokens=3 + index % 11, seed=index)


def test_run_takes_a_request_of_any_types(llm: LLM) -> None:
    wrong: list[Any] = ["3", None, True, 2.0, [2], 10**400]
    requests = [Request(prompt="p", n=n, max_tokens=3) for n in (2, *wrong, 2)]
    results = dict(llm.run(requests))
    assert sorted(results) == list(range(len(requests)))
    for index, result in results.items():
        if 0 < index <= len(wrong):
            assert isinstance(result, InvalidRequest) and result.param == "n"
        else:
            assert isinstance(result, Generation) and len(result.choices) == 2


def test_run_takes_requests_only_as_there_is_room() -> None:
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        while True:
            taken += 1
            yield Request(prompt="x", max_tokens=5, n=2)

    with start() as llm:
        results = llm.run(requests())
        next(results)
        assert taken <= 4 + 5  # a window of 8 sequences, 2 a request; refilled as some end
        results.close()
        assert idle(llm)


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"prompts": ""}, "the prompt is empty", "prompt"),
        ({"prompts": [[1, VOCAB_SIZE]]}, "token id 512; ids are between 0 and 511", "prompt"),
        ({"prompts": [[-1]]}, "token id -1", "prompt"),
        ({"prompts": "\ud800"}, "not Unicode", None),
        ({"prompts": 5}, "prompt takes text or token ids, got 5", "prompt"),
        ({"prompts": b"abc"}, "prompt takes text or token ids, got b'abc'", "prompt"),
        ({"prompts": {"a": 1}}, "prompt takes text or token ids", "prompt"),
        ({"prompts": ["a", 5]}, "prompt takes text or token ids, got 5", "prompt"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0", "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens takes an integer, got '9'", "max_tokens"),
        ({"temperature": "hot"}, "temperature takes a number, got 'hot'", "temperature"),
        ({"temperature": -1}, "temperature must be between 0", None),
        ({"top_k": 1.5}, "top_k takes an integer", "top_k"),
        ({"stop": ["a", ""]}, "stop takes non-empty strings", "stop"),
        ({"stop_token_ids": "x"}, "stop_token_ids takes token ids", "stop_token_ids"),
        ({"bad_words": ["a" * 9]}, "bad word must be between 1 and 8, got 9", None),
        ({"n": 0}, "n must be between 1 and 128, got 0", "n"),
        ({"temprature": 1}, "unknown option 'temprature'; the nearest is 'temperature'", None),
    ],
)
def test_wrong_options_are_refused(
    llm: LLM, options: dict[str, Any], message: str, param: str | None
) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        llm.generate(**({"prompts": ["fine", "too"]} | options))
    if param is not None:
        assert error.value.param == param
    assert len(llm.generate("still alive", max_tokens=2, ignore_eos=True)[0].token_ids) == 2


def test_too_long_prompts_are_refused_before_any_is_run(llm: LLM) -> None:
    with pytest.raises(ContextTooLong, match="4096 tokens and 1 more .* context is 4096"):
        llm.generate(["short", [65] * 4096])
    with pytest.raises(ContextTooLong, match="lower max_tokens") as error:
        llm.generate("short", max_tokens=4096)
    assert error.value.param == "max_tokens"


def test_a_model_without_a_template_cannot_chat() -> None:
    with start() as llm, pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}]]
)
def test_wrong_messages_are_refused(llm: LLM, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest):
        llm.chat([messages])


def test_a_failing_engine_raises_a_typed_error() -> None:
    engine = EngineThread(CONFIG, fake_parts)
    engine.engine.executor.fail_at = 3  # type: ignore[attr-defined]
    llm = LLM.over(engine, CONFIG, TOKENIZER)
    with pytest.raises(DeviceFailure):
        llm.generate(["a", "b"], max_tokens=50, ignore_eos=True)
    with pytest.raises(JaxserveError):
        llm.generate("again")
    llm.close()


def test_after_close_it_says_so() -> None:
    llm = start()
    llm.close()
    with pytest.raises(DeviceFailure, match="closed"):
        llm.generate("x")


def test_a_progress_bar_is_shown_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with start() as llm:
        llm.generate(["a", "b"], max_tokens=2)
        assert capsys.readouterr().err == ""
        llm._bars = True
        llm.generate(["a", "b"], max_tokens=2)
    assert "0/2" in capsys.readouterr().err


def test_settings_by_keyword() -> None:
    found = settings_of({"max_rows": 8, "weights__dtype": "bfloat16"})
    assert found == ["scheduler.max_rows=8", "weights.dtype=bfloat16"]
    with pytest.raises(ConfigError, match="weights__dtype or cache__dtype"):
        settings_of({"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="unknown configuration key 'max_rowz'.*max_rows"):
        LLM(max_rowz=3)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, jaxserve; assert 'jax' not in sys.modules and 'yaml' not in sys.modules;"
        "from jaxserve import LLM; assert LLM.__name__ == 'LLM'; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outputs_match_grammars(llm: LLM) -> None:
    choice, digits = {"choice": ["yes", "no"]}, {"regex": "[0-9]{3,6}"}
    (answer,) = llm.generate(["Is it?"], grammar=choice, seed=3)
    assert answer.text in ("yes", "no")
    answers = llm.generate(["a", "b", "c"], grammar=digits, seed=3, n=2)
    for answer in answers:
        assert all(c.text.isdigit() and 3 <= len(c.text) <= 6 for c in answer.choices)
    with pytest.raises(GrammarError, match="look-ahead"):
        llm.generate(["a"], grammar={"regex": "(?=a)b"})
    with pytest.raises(InvalidRequest, match="grammar"):
        llm.generate(["a"], grammar={"regexp": "a"})
    assert idle(llm)


def readme_example() -> str:
    page = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(from jaxserve import .*?)^```", page, re.M | re.S)
    return example


def module_example() -> str:
    """The first one."""
    return textwrap.dedent("\n\n".join((offline.__doc__ or "").split("\n\n")[1:3]))


@pytest.mark.parametrize("example", [readme_example(), module_example()], ids=["readme", "module"])
def test_examples(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an engine that says what it likes."""
    template = ChatTemplate(CHAT_TEMPLATE)
    monkeypatch.setattr("jaxserve.LLM", lambda: start(template=template), raising=False)
    exec(compile(example, "example", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out.count("\n") >= 3
