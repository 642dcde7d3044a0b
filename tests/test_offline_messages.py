"""LLM with tools, reasoning and structured output, the engine reciting what a model may say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import Config, ToolsConfig
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import GrammarError, InvalidRequest
from jaxserve.offline import LLM
from jaxserve.text.message import CallStart, CallText, gather
from jaxserve.text.template import ChatTemplate
from tests.fakes.reciter import CONFIG, PARAMETERS, PARIS, SCRIPTS, TIME, reciting_parts
from tests.fakes.tokenizer import CHAT_TEMPLATE, ByteTokenizer

HI = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time", "description": "The time."}},
]
#: No finite JSON matches it.
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def start(config: Config = CONFIG) -> LLM:
    """An LLM over a reciting engine."""
    engine = EngineThread(config, reciting_parts)
    return LLM.over(engine, config, ByteTokenizer(), ChatTemplate(CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """One for all tests."""
    with start() as made:
        yield made
    SCRIPTS.clear()


def seed_of(*texts: str) -> int:
    """A seed by which it says this."""
    seed = len(SCRIPTS) + 1
    SCRIPTS[seed] = texts
    return seed


def test_words_and_calls(llm: LLM) -> None:
    (answer,) = llm.chat(HI, tools=TOOLS, seed=seed_of(f"Well.\n{PARIS}\n{TIME}"), max_tokens=400)
    assert answer.text == "Well." and answer.finish_reason == "tool_calls"
    paris, time = answer.calls
    assert (paris.name, json.loads(paris.arguments)) == ("get_weather", {"city": "Paris"})
    assert (time.name, time.arguments, time.complete) == ("get_time", "{}", True)
    assert paris.id != time.id
    assert "get_weather" in (answer.prompt or "")


def test_a_call_that_has_begun_is_held_to_its_schema(llm: LLM) -> None:
    """Whatever the model would rather say."""
    text = (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "x": 1}}\n</tool_call>'
    )
    (answer,) = llm.chat(HI, tools=TOOLS, seed=seed_of(text), max_tokens=400)
    (call,) = answer.calls
    assert json.loads(call.arguments) == {"city": "Paris"} and call.complete


def test_choices_of_tools(llm: LLM) -> None:
    """Required, by name, none, and one call at most."""
    words = seed_of("No calls from me.")
    (answer,) = llm.chat(
        HI, tools=TOOLS[1:], tool_choice="required", parallel_tool_calls=False, seed=words
    )
    assert [call.name for call in answer.calls] == ["get_time"]
    named = {"type": "function", "function": {"name": "get_time"}}
    (answer,) = llm.chat(HI, tools=TOOLS, tool_choice=named, seed=words)
    assert [call.name for call in answer.calls] == ["get_time"]
    (answer,) = llm.chat(HI, tools=TOOLS, tool_choice="none", seed=words)
    assert answer.text == "No calls from me." and answer.calls == []
    assert "get_time" not in (answer.prompt or "")
    both = seed_of(f"{PARIS}\n{TIME}")
    (answer,) = llm.chat(HI, tools=TOOLS, parallel_tool_calls=False, seed=both, max_tokens=400)
    assert len(answer.calls) == 1 and answer.finish_reason == "tool_calls"


def test_what_comes_of_a_call_goes_back(llm: LLM) -> None:
    """As in OpenAI's messages: the call, and the tool's word."""
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    (answer,) = llm.chat(messages, tools=TOOLS, seed=seed_of("It is sunny."))
    assert answer.text == "It is sunny."
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in (answer.prompt or "")
    assert "sunny" in (answer.prompt or "")


def test_a_stream_has_the_parts_of_the_whole(llm: LLM) -> None:
    seed = seed_of(f"Well.\n{PARIS}")
    (whole,) = llm.chat(HI, tools=TOOLS, seed=seed, max_tokens=400)
    pieces = list(llm.stream(HI, tools=TOOLS, seed=seed, max_tokens=400))
    read = gather(part for piece in pieces for part in piece.parts)
    assert "".join(piece.text for piece in pieces) == read.text == whole.text == "Well."
    assert [(c.name, c.arguments) for c in read.calls] == [
        (c.name, c.arguments) for c in whole.calls
    ]
    kinds = [type(part) for piece in pieces for part in piece.parts]
    assert kinds.count(CallStart) == 1 and kinds.count(CallText) > 1
    assert pieces[-1].finish_reason == "tool_calls"
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids


def test_reasoning() -> None:
    config = Config(
        model=CONFIG.model,
        cache=CONFIG.cache,
        scheduler=CONFIG.scheduler,
        tools=ToolsConfig(reasoning="think"),
    )
    with start(config) as thoughtful:
        seed = seed_of("<think>Hm.</think>Well.")
        (answer,) = thoughtful.chat(HI, seed=seed)
        assert (answer.choices[0].reasoning, answer.text) == ("Hm.", "Well.")
        (answer,) = thoughtful.generate("hi", seed=seed)
        assert answer.text == "<think>Hm.</think>Well." and answer.choices[0].reasoning is None


def test_response_formats(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 5}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (answer,) = llm.chat(HI, response_format=wanted, seed=seed_of('{"a": 5} is it.'))
    assert answer.text == '{"a": 5}' and answer.finish_reason == "stop"
    (answer,) = llm.generate("hi", response_format={"type": "json_object"}, seed=seed_of('{"b":1}'))
    assert json.loads(answer.text) == {"b": 1}
    both = seed_of('{"a": 5}', PARIS)
    (answer,) = llm.chat(HI, response_format=wanted, tools=TOOLS, seed=both, n=2, max_tokens=400)
    assert json.loads(answer.choices[0].text) == {"a": 5}
    assert [call.name for call in answer.choices[1].calls] == ["get_weather"]


def test_a_loose_tool_may_have_any_object(llm: LLM) -> None:
    """One that is strict is refused instead, before anything is generated."""
    loose = {"name": "f", "parameters": {"type": "object", "not": {}}}
    text = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    tools = [{"type": "function", "function": loose}]
    (answer,) = llm.chat(HI, tools=tools, seed=seed_of(text), max_tokens=400)
    assert json.loads(answer.calls[0].arguments) == {"x": 1}
    with pytest.raises(GrammarError, match="parameters") as error:
        llm.chat(HI, tools=[{"type": "function", "function": loose | {"strict": True}}])
    assert error.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": [{"type": "x"}]}, r"tools\[0\].type"),
        ({"tools": 5}, "tools must be a list"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice must be none, auto, required"),
        ({"tools": [{"type": "function", "function": {"name": object()}}]}, "not JSON"),
        ({"tools": TOOLS, "template": {"tools": TOOLS}}, "either tools or template's tools"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "grammar": {"regex": "a"}}, "go with response_format only"),
        ({"response_format": {"type": "json_object"}, "grammar": {"regex": "a"}}, "exclude each"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be"),
        ({"grammar": {"json": ENDLESS}}, r'grammar: "\$ref": "#" never ends'),
        ({"grammar": {"grammar": 'start[temperature=0.5]: "a"'}}, "attribute 'temperature'"),
        ({"adapter": "x"}, "adapters are off here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(llm: LLM, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        llm.chat(HI, **options)


def test_tools_go_with_messages(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="tools go with messages"):
        llm.generate("hi", tools=TOOLS)


@pytest.mark.parametrize(
    ("page", "said"), [("tools.md", r"add \{.*"), ("structured-output.md", r"(yes|no)\n")]
)
def test_the_example_of_the_page(
    page: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an engine that says what it likes, where it may."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    (example,) = re.findall(r"^```python\n(from jaxserve import .*?)^```", text, re.M | re.S)
    monkeypatch.setattr("jaxserve.LLM", start, raising=False)
    exec(compile(example, page, "exec", dont_inherit=True), {})
    assert re.fullmatch(said, capsys.readouterr().out, re.S)
