"""Which tools the embedded model may call, must call and may not, through the whole server.

The conversations show it calls that it goes on with, of a unit that is not in the schema.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.server.conftest import Server
from tests.server.test_formats import MODEL, PARIS, object_of, valid

pytestmark = pytest.mark.slow

HOSTILE_S = 5
WEATHER = object_of(
    city={"type": "string", "maxLength": 12}, unit={"enum": ["celsius", "fahrenheit"]}
)
ZONE = object_of(zone={"type": "integer", "minimum": 0, "maximum": 12})
SCHEMAS = {"get_weather": WEATHER, "get_time": ZONE}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


def conversation(*questions: tuple[str, ...], then: str) -> list[Any]:
    """Each question is of these cities, and called for with a unit that there is not."""
    messages: list[Any] = []
    for cities in questions:
        calls: list[Any] = []
        for city in cities:
            arguments = json.dumps({"city": city, "unit": "kelvin"})
            function = {"name": "get_weather", "arguments": arguments}
            calls.append({"id": f"call_{city}", "type": "function", "function": function})
        asked = f"How is the weather in {' and in '.join(cities)}?"
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": None, "tool_calls": calls},
            *({"role": "tool", "tool_call_id": call["id"], "content": "sun"} for call in calls),
            {"role": "assistant", "content": "The sun shines."},
        ]
    return [*messages, {"role": "user", "content": then}]


ONE = conversation(("Rome",), ("Oslo",), ("Madrid",), then="How is the weather in Paris?")
TWO = conversation(
    ("Rome", "Oslo"), ("Bern", "Lyon"), then="How is the weather in Paris and in Turin?"
)


def calls_of(choice: Any) -> list[tuple[str, str]]:
    """Names and arguments; those of whole calls match their schemas."""
    calls = [
        (call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()
    ]
    if choice.finish_reason == "tool_calls":
        for name, arguments in calls:
            valid(SCHEMAS[name])(arguments)
    return calls


def test_tools_that_may_be_called(client: OpenAI) -> None:
    """Streamed, each choice says and calls the same."""
    asked: dict[str, Any] = {"model": MODEL, "messages": ONE, "tools": TOOLS, "n": 4, "seed": 2}
    choices = client.chat.completions.create(**asked, max_tokens=60).choices
    found = [(choice.message.content or "", calls_of(choice)) for choice in choices]
    assert "tool_calls" in [choice.finish_reason for choice in choices], found
    streamed: list[tuple[list[str], list[tuple[str, str]]]] = [([], []) for _ in choices]
    for chunk in client.chat.completions.create(**asked, max_tokens=60, stream=True):
        for choice in chunk.choices:
            texts, calls = streamed[choice.index]
            texts.append(choice.delta.content or "")
            for call in choice.delta.tool_calls or ():
                if call.index == len(calls):
                    calls.append((call.function.name, ""))
                name, begun = calls[call.index]
                calls[call.index] = name, begun + call.function.arguments
    assert [("".join(texts), calls) for texts, calls in streamed] == found


def test_tools_that_may_not_be_called_are_words(client: OpenAI) -> None:
    """The model writes a call, as its examples have it, and nobody is asked to call."""
    (choice,) = client.chat.completions.create(
        model=MODEL, messages=ONE, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=60
    ).choices
    assert choice.message.tool_calls is None and choice.finish_reason in ("stop", "length")
    content = choice.message.content or ""
    assert content.startswith('<tool_call>\n{"name": "get_weather"') and "kelvin" in content


def test_a_tool_by_name(client: OpenAI) -> None:
    """Though the examples call the other one."""
    named: Any = {"type": "function", "function": {"name": "get_time"}}
    for choice in client.chat.completions.create(
        model=MODEL, messages=ONE, tools=TOOLS, tool_choice=named, n=2, seed=1, max_tokens=60
    ).choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert [name for name, _ in calls_of(choice)] == ["get_time"]


@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_where_they_may_be(client: OpenAI, parallel: bool) -> None:
    choices = client.chat.completions.create(
        model=MODEL, messages=TWO, tools=TOOLS, tool_choice="required", n=3, seed=1,
        temperature=0.5, max_tokens=120, parallel_tool_calls=parallel,
    ).choices  # fmt: skip
    numbers = {len(calls_of(choice)) for choice in choices}
    assert (max(numbers) > 1) if parallel else numbers == {1}
    assert {choice.finish_reason for choice in choices} <= {"tool_calls", "length"}


def tool(name: str, **schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": schema}
    return {"name": name, "strict": True, "parameters": parameters}


HOSTILE: list[tuple[list[dict[str, Any]], str, str]] = [
    ([tool(f"t{n}", a={"pattern": "(a|b){9}"}) for n in range(500)], "tools", "at most 128 tools"),
    ([tool("f"), tool("g", a={"uniqueItems": True})], "tools[1]", "uniqueItems"),
    ([tool("f", a={"type": "strin"})], "tools[0]", "strin"),
    ([tool("f", a={"pattern": "(?=a)b"})], "tools[0]", "look-around"),
    ([tool("f", **{f"p{n}": {} for n in range(6000)})], "tools[0]", "6000 properties"),
]


@pytest.mark.parametrize(("functions", "param", "said"), HOSTILE, ids=[h[2] for h in HOSTILE])
def test_hostile_tools_are_refused_by_name(
    client: OpenAI, functions: list[dict[str, Any]], param: str, said: str
) -> None:
    tools: list[Any] = [{"type": "function", "function": function} for function in functions]
    flat: list[Any] = [{"type": "function", **function} for function in functions]
    for create, asked in (
        (client.chat.completions.create, {"messages": ONE, "tools": tools}),
        (client.responses.create, {"input": PARIS, "tools": flat}),
    ):
        begun_s = time.monotonic()
        with pytest.raises(BadRequestError, match=said) as caught:
            create(model=MODEL, **asked)
        assert time.monotonic() - begun_s < HOSTILE_S
        assert (caught.value.param or "").startswith(param)


def test_nothing_was_compiled_for_it(server: Server) -> None:
    assert server.metrics()["jaxserve_compiles_after_warmup"] == 0
