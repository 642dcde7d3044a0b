"""Tools and reasoning in chat, through the real `openai` client, the engine reciting."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from jaxserve.config import ToolsConfig
from jaxserve.engine.thread import EngineThread
from tests.fakes.reciter import (
    PARAMETERS,
    PARIS,
    SCRIPTS,
    TIME,
    reciting_engine,
)
from tests.http.frontend import Front, chat_prompt, expected

HI = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time", "description": "The time."}},
]


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineThread]:
    """An engine that recites."""
    with reciting_engine() as made:
        yield made


@pytest.fixture(scope="module")
def front(engine) -> Iterator[Front]:
    """An application over it."""
    made = Front(engine)
    yield made
    made.close()


@pytest.fixture(scope="module")
def thoughtful(engine) -> Iterator[Front]:
    """The same, for a model that reasons."""
    made = Front(engine, tools=ToolsConfig(reasoning="think"))
    yield made
    made.close()


def client_of(front: Front) -> openai.AsyncOpenAI:
    """OpenAI's client on an application."""
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://front/v1", http_client=front.http, max_retries=0
    )


def ask(front: Front, *texts: str, **options: Any) -> Any:
    """The answer, or the chunks, of a model that says this."""
    seed = len(SCRIPTS) + 1
    SCRIPTS[seed] = texts
    fields = {"model": "fake", "messages": HI, "tools": TOOLS, "seed": seed} | options

    async def main() -> Any:
        made = await client_of(front).chat.completions.create(**fields)
        return [chunk async for chunk in made] if options.get("stream") else made

    return front.run(main())


def message_of(chunks: list[Any], index: int = 0) -> tuple[dict[str, Any], str]:
    """What a client makes of a stream's deltas, and why it ended; each in OpenAI's order."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    reason = None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            assert reason is None, "nothing comes after a finish reason"
            reason = choice.finish_reason
            delta = choice.delta
            message["content"] += delta.content or ""
            message["reasoning"] += (delta.model_extra or {}).get("reasoning_content") or ""
            for call in delta.tool_calls or ():
                calls = message["calls"]
                if call.index == len(calls):
                    assert call.id and call.type == "function" and call.function.arguments == ""
                    calls.append([call.id, call.function.name, ""])
                else:
                    assert call.index == len(calls) - 1, "one call after another"
                    assert call.id is None and call.function.name is None
                    calls[-1][2] += call.function.arguments
    assert reason is not None
    return message, reason


def whole_of(choice: Any) -> dict[str, Any]:
    """The same of an answer that was not streamed."""
    message = choice.message
    return {
        "content": message.content or "",
        "reasoning": (message.model_extra or {}).get("reasoning_content") or "",
        "calls": [
            [call.id, call.function.name, call.function.arguments]
            for call in message.tool_calls or ()
        ],
    }


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """For comparison: ids are drawn."""
    return message | {"calls": [call[1:] for call in message["calls"]]}


def test_a_call(front):
    answer = ask(front, f"Let me see.\n{PARIS}")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert answer.usage.completion_tokens == len(f"Let me see.\n{PARIS}")


def test_only_calls_have_no_content(front):
    (choice,) = ask(front, f"{PARIS}\n{TIME}").choices
    assert choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "get_time"]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_words_only(front):
    (choice,) = ask(front, "Hello <you>\n").choices
    assert choice.message.content == "Hello <you>\n" and choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    "text", ["Hi", f"Hi {PARIS}\n{TIME}", PARIS, "", PARIS[:-30], PARIS[:40], PARIS + " and more"]
)
def test_the_stream_is_the_answer(front, text):
    limit = max(len(text), 1)
    whole = ask(front, text, max_tokens=limit)
    options = {"include_usage": True}
    chunks = ask(front, text, max_tokens=limit, stream=True, stream_options=options)
    streamed, reason = message_of(chunks)
    assert without_ids(streamed) == without_ids(whole_of(whole.choices[0]))
    assert reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"


def test_arguments_are_streamed(front):
    chunks = ask(front, PARIS.replace("Paris", "Paris, the capital"), stream=True)
    pieces = [
        call.function.arguments
        for chunk in chunks
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ]
    assert pieces[0] == "" and len(pieces) > 3
    assert "".join(pieces) == '{"city": "Paris, the capital"}'


def test_calls_of_two_choices(front):
    chunks = ask(front, PARIS, f"Hm. {TIME}", n=2, stream=True)
    first, second = message_of(chunks, 0), message_of(chunks, 1)
    assert without_ids(first[0])["calls"] == [["get_weather", '{"city": "Paris"}']]
    assert without_ids(second[0])["calls"] == [["get_time", "{}"]]
    assert (first[1], second[1], second[0]["content"]) == ("tool_calls", "tool_calls", "Hm.")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_not_called_complete(front, stream):
    cut = PARIS.index("Par") + 3
    made = ask(front, PARIS, stream=stream, max_tokens=cut)
    message, reason = message_of(made) if stream else (whole_of(made.choices[0]), "")
    assert stream or made.choices[0].finish_reason == "length"
    assert not stream or reason == "length"
    assert without_ids(message)["calls"] == [["get_weather", '{"city": "Par']]


def test_one_call_only(front):
    answer = ask(front, f"{PARIS}\n{TIME}", parallel_tool_calls=False)
    (choice,) = answer.choices
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"
    assert answer.usage.completion_tokens == len(PARIS) - len("\n</tool_call>")


def test_no_tools_may_be_called(front):
    for options in ({"tool_choice": "none"}, {"tools": openai.omit}):
        (choice,) = ask(front, PARIS, **options).choices
        assert choice.message.content == PARIS and choice.message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(thoughtful, stream):
    text = f"<think>\nHm, {TIME}?\n</think>\n\nWell.\n{PARIS}"
    made = ask(
        thoughtful, text, stream=stream, stream_options={"include_usage": True} if stream else None
    )
    message = message_of(made)[0] if stream else whole_of(made.choices[0])
    assert without_ids(message) == {
        "reasoning": f"Hm, {TIME}?",
        "content": "Well.",
        "calls": [["get_weather", '{"city": "Paris"}']],
    }
    usage = (made[-1] if stream else made).usage
    thought = text.index("</think>") + len("</think>") - len("<think")
    assert usage.completion_tokens_details.reasoning_tokens == thought


def test_reasoning_without_tools(thoughtful):
    (choice,) = ask(thoughtful, "<think>Hm</think>Yes", tools=openai.omit).choices
    assert choice.message.content == "Yes"
    assert choice.message.model_extra["reasoning_content"] == "Hm"
    assert choice.finish_reason == "stop"


FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [{"a": 1}]}}}
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<fn=f>", "schema": {"enum": [1]}, "end": "</fn>"}],
    "triggers": ["<fn="],
}
#: The model goes on to think: its prompt ends so.
OPENED = {
    "messages": [{"role": "user", "content": "hi <think>\n"}],
    "extra_body": {"add_generation_prompt": False},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("options", "content", "calls"),
    [
        ({"tools": openai.omit, "response_format": FORM}, '{"a": 1}', []),
        ({"tool_choice": "required"}, "", [["get_weather", '{"city": "Paris"}']]),
    ],
)
def test_what_comes_after_the_thought_is_held_to(
    thoughtful, options, content, calls, opened, stream
):
    """The thought is free, also of what begins a call."""
    said = f"Hm <tool_call> {{5</think>{PARIS if calls else content} and more"
    more = OPENED if opened else {}
    made = ask(thoughtful, said if opened else f"<think>{said}", stream=stream, **options | more)
    message, reason = message_of(made) if stream else (whole_of(made.choices[0]), None)
    assert without_ids(message) == {
        "reasoning": "Hm <tool_call> {5",
        "content": content,
        "calls": calls,
    }
    assert reason in (None, "tool_calls" if calls else "stop")


#: And what matches.
GRAMMARS = [
    ({"guided_choice": ["yes", "no"]}, "yes"),
    ({"guided_regex": "y[a-z]s"}, "yes"),
    ({"guided_grammar": 'start: "y" /e+/ "s"'}, "yes"),
    ({"guided_json": {"enum": ["yes"]}}, '"yes"'),
]


@pytest.mark.parametrize(
    ("grammar", "content", "opened"),
    [
        *((*grammar, opened) for grammar in GRAMMARS for opened in (False, True)),
        ({"response_format": TAGS}, "yes <fn=f>1</fn>", True),
    ],
)
def test_every_grammar_holds_behind_the_thought(thoughtful, grammar, content, opened):
    options: dict[str, Any] = dict(OPENED if opened else {}) | {"tools": openai.omit}
    options["extra_body"] = options.get("extra_body", {}) | grammar
    said = f"Hm <fn=5 </think>{content}"
    (choice,) = ask(thoughtful, said if opened else f"<think>{said}", **options).choices
    assert choice.message.model_extra["reasoning_content"] == "Hm <fn=5"
    assert (choice.message.content, choice.finish_reason) == (content, "stop")


def test_ebnf_behind_a_thought_is_refused(thoughtful):
    options: dict[str, Any] = dict(OPENED) | {"tools": openai.omit}
    options["extra_body"] = OPENED["extra_body"] | {"guided_grammar": 'root ::= "yes"'}
    with pytest.raises(openai.BadRequestError, match="Lark's syntax") as refused:
        ask(thoughtful, "Hm</think>yes", **options)
    assert refused.value.param == "guided_grammar"


def test_log_probabilities_of_all_tokens(front):
    (choice,) = ask(front, PARIS, logprobs=True).choices
    assert len(choice.logprobs.content) == len(PARIS)
    chunks = ask(front, PARIS, logprobs=True, stream=True)
    entries = [
        entry
        for chunk in chunks
        for c in chunk.choices
        if c.logprobs
        for entry in c.logprobs.content
    ]
    assert "".join(entry.token for entry in entries) == PARIS


def test_the_client_parses_calls(front):
    class Weather(BaseModel):
        city: str

    SCRIPTS[1000] = (PARIS,)
    tool: Any = openai.pydantic_function_tool(Weather, name="get_weather")
    client = client_of(front)
    answer = front.run(
        client.chat.completions.parse(model="fake", messages=HI, tools=[tool], seed=1000)
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Paris")

    async def streamed() -> Any:
        async with client.chat.completions.stream(
            model="fake", messages=HI, tools=[tool], seed=1000
        ) as stream:
            kinds = [event.type async for event in stream]
            return kinds, await stream.get_final_completion()

    kinds, final = front.run(streamed())
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Paris")


def test_the_conversation_goes_on(front):
    first = ask(front, PARIS)
    message = first.choices[0].message
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    messages = [*HI, message.model_dump(exclude_none=True), answer]
    (choice,) = ask(front, "It rains.", messages=messages).choices
    assert choice.message.content == "It rains."
    tokens = front.ok("/tokenize", {"messages": messages, "tools": TOOLS})["tokens"]
    prompt = front.ok("/detokenize", {"tokens": tokens})["prompt"]
    assert prompt.startswith("system: You can call functions.")
    assert f"assistant: {PARIS}\n" in prompt
    assert "user: <tool_response>\nrain\n</tool_response>\n" in prompt


def test_many_at_once_do_not_mix(front):
    async def main() -> list[Any]:
        client = client_of(front)
        for n in range(12):
            SCRIPTS[2000 + n] = (PARIS.replace("Paris", f"City {n}"),)
        return await asyncio.gather(
            *(
                client.chat.completions.create(
                    model="fake", messages=HI, tools=TOOLS, seed=2000 + n
                )
                for n in range(12)
            )
        )

    for n, answer in enumerate(front.run(main())):
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": f"City {n}"}


CHOOSY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CHOOSY_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": CHOOSY}} for name in "fg"
]
ONLY_G = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize("parser", ["hermes", "llama3", "mistral", "pythonic", "json"])
def test_a_model_that_says_anything_says_calls_where_it_must(engine, parser):
    """The fake's tokens are as good as random: the grammar alone makes calls of them."""
    made = Front(engine, tools=ToolsConfig(parser=parser))
    body = {"messages": HI, "tools": CHOOSY_TOOLS, "n": 4, "seed": 7000, "max_tokens": 400}
    for choice, names in (("required", {"f", "g"}), (ONLY_G, {"g"})):
        for parallel in (True, False):
            fields = {"tool_choice": choice, "parallel_tool_calls": parallel}
            answer = made.ok("/v1/chat/completions", body | fields)
            for one in answer["choices"]:
                calls = one["message"]["tool_calls"]
                assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
                assert (parallel and choice == "required") or len(calls) == 1
                for call in calls:
                    jsonschema.validate(json.loads(call["function"]["arguments"]), CHOOSY)
                assert {call["function"]["name"] for call in calls} <= names
    made.close()


def test_a_call_that_is_begun_is_held_to(front):
    for said in ("Hm <tool_call>no", '<tool_call>\n{"name": "h", "arguments": 5'):
        answer = ask(front, said, tools=CHOOSY_TOOLS, max_tokens=400)
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and call.function.name in "fg"
        jsonschema.validate(json.loads(call.function.arguments), CHOOSY)


@pytest.mark.parametrize("parser", ["hermes", "pythonic"])
def test_any_schema_gives_an_answer_or_a_400(engine, parser):
    made = Front(engine, tools=ToolsConfig(parser=parser))
    odd = ({"properties": 5}, {"properties": {"a": 5}}, {"required": 7}, {"$ref": 5}, {"enum": 3})
    for schema in (*odd, {"properties": {"a b": {}}}, {"anyOf": []}, {"type": "object", "not": {}}):
        for strict in (False, True):
            tools = [tool(parameters=schema, strict=strict)]
            response = made.post(
                "/v1/chat/completions", {"messages": HI, "tools": tools, "max_tokens": 3}
            )
            assert response.status_code in ((200, 400) if strict else (200,)), response.text
    made.close()


def test_schemas_that_cannot_be_held_to(front):
    hard = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tools = [tool(name="f"), tool(name="g", parameters=hard)]
    body = {"messages": HI, "tools": tools, "tool_choice": "required", "seed": 7001}
    loose = front.ok("/v1/chat/completions", body | {"max_tokens": 200})
    assert loose["choices"][0]["message"]["tool_calls"], "any object will do"
    tools[1]["function"]["strict"] = True
    response = front.post("/v1/chat/completions", body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "tools[1].function.parameters" and "not" in error["message"]


def test_words_of_a_form_beside_tools(front):
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"enum": [{"a": 1}, {"a": 2}]}},
    }
    (choice,) = ask(front, '{"a": 2} and more', response_format=form).choices
    assert json.loads(choice.message.content) == {"a": 2}
    (choice,) = ask(front, PARIS, response_format=form).choices
    assert choice.message.tool_calls[0].function.name == "get_weather"
    response = front.post(
        "/v1/chat/completions", {"messages": HI, "tools": TOOLS, "guided_regex": "a+"}
    )
    assert response.json()["error"]["param"] == "tools"


def tool(**fields: Any) -> dict[str, Any]:
    """A tool with something wrong."""
    return {"type": "function", "function": {"name": "f"} | fields}


F = tool()
NAMED = {"type": "function", "function": {"name": "g"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
CALLING = {"role": "assistant", "content": None}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [F] * 129}, "tools", "list of 129"),
    ({"tools": [tool(name=f"t{n}") for n in range(500)]}, "tools", "at most 128 tools"),
    ({"tools": {}}, "tools", "{}"),
    ({"tools": [5]}, "tools[0]", "5"),
    ({"tools": [{}]}, "tools[0].type", "null"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "custom"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "null"),
    ({"tools": [tool(name="a b")]}, "tools[0].function.name", "a b"),
    ({"tools": [tool(name="é")]}, "tools[0].function.name", "é"),
    ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [tool(name=5)]}, "tools[0].function.name", "5"),
    ({"tools": [tool(description=5)]}, "tools[0].function.description", "5"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "list"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters.type", "array"),
    ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "yes"),
    ({"tools": [tool(nmae="x")]}, "tools[0].function.nmae", "name"),
    ({"tools": [F | {"x": 1}]}, "tools[0].x", "unknown"),
    ({"tools": [F, F]}, "tools[1].function.name", "different"),
    ({"tools": [F], "tool_choice": "any"}, "tool_choice", "any"),
    ({"tools": [F], "tool_choice": 5}, "tool_choice", "5"),
    ({"tools": [F], "tool_choice": {}}, "tool_choice.type", "null"),
    ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.function", "null"),
    ({"tools": [F], "tool_choice": NAMED}, "tool_choice", '"g"'),
    ({"tools": [F], "tool_choice": ALLOWED}, "tool_choice", '"g"'),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": NAMED}, "tool_choice", "none"),
    ({"tools": [F], "parallel_tool_calls": 1}, "parallel_tool_calls", "1"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ({"function_call": {"name": "f"}}, "function_call", "not supported"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "null"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "function"),
    ({"messages": [HI[0] | {"tool_calls": [{}]}]}, "messages[0].tool_calls", "list"),
    ({"messages": [HI[0] | {"tool_call_id": "x"}]}, "messages[0].tool_call_id", "x"),
    ({"messages": [CALLING]}, "messages[0].content", "null"),
    ({"messages": [CALLING | {"tool_calls": [5]}]}, "messages[0].tool_calls[0]", "5"),
    ({"messages": [CALLING | {"tool_calls": [{}]}]}, "messages[0].tool_calls[0].id", "null"),
    (
        {"messages": [CALLING | {"tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
        "null",
    ),
]


@pytest.mark.parametrize(
    ("fields", "param", "words"), WRONG, ids=[f"{i}-{p}" for i, (_, p, _) in enumerate(WRONG)]
)
def test_what_is_wrong_is_named(front, fields, param, words):
    response = front.post("/v1/chat/completions", {"messages": HI} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"]


def strict(**schema: Any) -> list[dict[str, Any]]:
    """One tool whose schema must be held to."""
    return [tool(parameters={"type": "object"} | schema, strict=True)]


HOSTILE = [
    [tool(name=f"t{n}") for n in range(500)],
    [tool(name=f"t{n}", description="x" * 200) for n in range(128)],
    strict(properties={"a": {"$ref": "#"}}, **{"$ref": "#/properties/a"}),
    strict(properties={"a": {"$ref": "#/$defs/nowhere"}}),
    strict(properties={"a": {"type": "string", "pattern": "(?<=a)b"}}),
    strict(properties={"a": {"type": "string", "pattern": "((a{1,999}){1,999}){1,999}b(?=c)"}}),
    strict(properties={"a": False}, required=["a"]),
]


def test_hostile_tools_disturb_nobody(front):
    """Another stream goes on, and says what it would have said."""
    plain = {"messages": HI, "seed": 7002, "ignore_eos": True, "max_tokens": 1500, "stream": True}
    text = expected(chat_prompt("hi"), seed=7002, ignore_eos=True, max_tokens=1500)[1]

    async def read() -> str:
        said: list[str] = []
        async with front.http.stream("POST", "/v1/chat/completions", json=plain) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    said += [
                        choice["delta"].get("content", "")
                        for choice in json.loads(line[6:])["choices"]
                    ]
        return "".join(said)

    async def main() -> tuple[str, list[tuple[int, float]]]:
        stream = asyncio.create_task(read())
        outcomes = []
        for tools in HOSTILE:
            started_s = time.monotonic()
            response = await front.http.post(
                "/v1/chat/completions", json={"messages": HI, "tools": tools, "max_tokens": 5}
            )
            outcomes.append((response.status_code, time.monotonic() - started_s))
        return await stream, outcomes

    said, outcomes = front.run(main())
    assert said == text
    assert [status for status, _ in outcomes] == [400] * len(HOSTILE)
    assert max(took_s for _, took_s in outcomes) < 5.0


CONVERSATION: dict[str, Any] = {
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ],
    "tools": CHOOSY_TOOLS,
    "tool_choice": {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [ONLY_G]},
    },
    "parallel_tool_calls": False,
    "max_tokens": 3,
}
ITEMS: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
    ],
    "instructions": "be brief",
    "tools": [{"type": "function", "name": "f", "parameters": CHOOSY, "strict": True}],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "json_schema", "name": "x", "schema": CHOOSY}},
    "include": ["message.output_text.logprobs"],
    "max_output_tokens": 3,
}


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a value."""
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    return [path, *(found for key, inner in pairs for found in places_in(inner, (*path, key)))]


WHERE = [
    (path, body, place)
    for path, body in (("/v1/chat/completions", CONVERSATION), ("/v1/responses", ITEMS))
    for place in places_in(body)[1:]
]
odd_values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.text(max_size=6), st.just(10**30),
    st.sampled_from([[], {}, [[]], [{}], {"type": "function"}, "function", "required", 0.5]),
)  # fmt: skip


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(WHERE), value=odd_values)
def test_one_odd_value_never_gives_a_500(front, where, value):
    path, body, place = where
    changed = copy.deepcopy(body)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    response = front.post(path, changed | {"max_completion_tokens": None, "seed": 1})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["param"]


def test_these_bodies_are_right_where_nothing_is_changed(front):
    front.ok("/v1/chat/completions", CONVERSATION)
    front.ok("/v1/responses", ITEMS)
