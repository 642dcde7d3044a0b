"""/v1/responses through the real `openai` client, the engine reciting."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel, TypeAdapter

from jaxserve.config import ToolsConfig
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import DeviceFailure
from jaxserve.http.generation import Delta, Usage
from jaxserve.http.response_wire import ResponseWire
from jaxserve.types import TokenLogprobs
from tests.fakes.reciter import (
    PARAMETERS,
    PARIS,
    SCRIPTS,
    TIME,
    reciting_engine,
)
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import Front

PATH = "/v1/responses"
TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True},
    {"type": "function", "name": "get_time"},
]


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineThread]:
    """An engine that recites."""
    with reciting_engine() as made:
        yield made


@pytest.fixture(scope="module")
def front(engine) -> Iterator[Front]:
    """An application over it, of a model that reasons if it likes to."""
    made = Front(engine, tools=ToolsConfig(reasoning="think"))
    yield made
    made.close()


def ask(front: Front, text: str, **options: Any) -> Any:
    """The response, or its events, of a model that says this."""
    seed = len(SCRIPTS) + 1
    SCRIPTS[seed] = (text,)
    client = openai.AsyncOpenAI(
        api_key="none", base_url="http://front/v1", http_client=front.http, max_retries=0
    )
    fields = {"model": "fake", "input": "hi", "extra_body": {"seed": seed}} | options

    async def main() -> Any:
        made = await client.responses.create(**fields)
        return [event async for event in made] if options.get("stream") else made

    return front.run(main())


def strictly(document: Any, kind: Any) -> None:
    """Checks a document against OpenAI's own types, nothing forgiven."""
    TypeAdapter(kind).validate_json(json.dumps(document), strict=True)


def without_ids(items: list[Any]) -> list[dict[str, Any]]:
    """Items for comparison: ids are drawn."""
    return [item.model_dump(exclude={"id", "call_id"}) for item in items]


def test_a_text(front):
    response = ask(front, "Hello.", metadata={"a": "b"}, instructions="Be brief.", temperature=0.5)
    assert response.output_text == "Hello."
    assert (response.status, response.object, response.model) == ("completed", "response", "fake")
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")
    assert response.metadata == {"a": "b"} and response.instructions == "Be brief."
    assert response.temperature == 0.5 and response.top_p == 1.0 and response.error is None
    assert response.store is False and response.tools == [] and response.tool_choice == "none"
    usage = response.usage
    assert usage.output_tokens == 6 and usage.output_tokens_details.reasoning_tokens == 0
    assert usage.input_tokens == len("system: Be brief.\nuser: hi\nassistant: ")
    assert usage.total_tokens == usage.input_tokens + 6
    strictly(front.ok(PATH, {"input": "hi", "max_output_tokens": 3}), Response)


def test_what_is_cut_is_incomplete(front):
    response = ask(front, "Hello.", max_output_tokens=4)
    assert response.output_text == "Hell" and response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.max_output_tokens == 4


def test_reasoning_words_and_calls_are_items(front):
    text = f"<think>Hm.</think>Well.\n{PARIS}\n{TIME}"
    response = ask(front, text, tools=TOOLS)
    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    thought, message, paris, time = response.output
    assert thought.content[0].text == "Hm." and thought.summary == []
    assert message.content[0].text == "Well."
    assert (paris.name, json.loads(paris.arguments)) == ("get_weather", {"city": "Paris"})
    assert (time.name, time.arguments, time.status) == ("get_time", "{}", "completed")
    assert paris.call_id.startswith("call_") and paris.id.startswith("fc_")
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert [tool.name for tool in response.tools] == ["get_weather", "get_time"]
    assert response.tools[0].strict and response.tool_choice == "auto"


SAID = [
    "Hello.",
    "",
    f"<think>Hm.\n</think>\nWell.\n{PARIS}\n{TIME}",
    PARIS,
    PARIS[:50],
    "<think>never done",
]


@pytest.mark.parametrize("text", SAID)
@pytest.mark.parametrize("limit", [200, 40])
def test_the_stream_is_the_response(front, text, limit):
    options: dict[str, Any] = {"tools": TOOLS, "max_output_tokens": limit}
    whole = ask(front, text, **options)
    events = ask(front, text, stream=True, **options)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert without_ids(last.response.output) == without_ids(whole.output)
    assert counts(last.response.usage) == counts(whole.usage)
    assert last.response.incomplete_details == whole.incomplete_details
    assert {event.response.id for event in events if hasattr(event, "response")} == {
        last.response.id
    }
    check_items(events[2:-1], last.response.output)


def counts(usage: Any) -> dict[str, Any]:
    """Usage, less what was found in the cache: the second of two finds what the first left."""
    return usage.model_dump(exclude={"input_tokens_details": {"cached_tokens"}})


def check_items(events: list[Any], items: list[Any]) -> None:
    """Each item is added, filled by its deltas, and done, before the next one begins."""
    current, text = -1, ""
    for event in events:
        if event.type == "response.output_item.added":
            current, text = current + 1, ""
            assert event.item.id == items[current].id and event.item.status == "in_progress"
        assert event.output_index == current
        if hasattr(event, "item_id"):
            assert event.item_id == items[current].id
        if event.type.endswith(".delta"):
            text += event.delta
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == text == items[current].arguments
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert event.text == text == items[current].content[0].text
        elif event.type == "response.content_part.done":
            assert event.part.text == text
        elif event.type == "response.output_item.done":
            assert event.item == items[current]
    assert current == len(items) - 1


def test_the_kinds_of_events_of_a_text(front):
    kinds = [event.type for event in ask(front, "Hi", stream=True)]
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_the_wire_is_typed_events(front):
    SCRIPTS[900] = ("Hi",)
    text = front.post(PATH, {"input": "hi", "seed": 900, "stream": True}).text
    blocks = text.strip().split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    assert "[DONE]" not in text


def test_the_clients_own_stream_helper(front):
    SCRIPTS[901] = (PARIS,)
    client = openai.AsyncOpenAI(api_key="x", base_url="http://front/v1", http_client=front.http)

    async def main() -> Any:
        async with client.responses.stream(
            model="fake", input="hi", tools=TOOLS[:1], extra_body={"seed": 901}
        ) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_response()

    response = front.run(main())
    (call,) = response.output
    assert call.parsed_arguments == {"city": "Paris"} and response.status == "completed"


def test_structured_text(front):
    class Answer(BaseModel):
        city: Literal["Paris", "Rome"]
        days: Literal[3, 5]

    client = openai.AsyncOpenAI(api_key="x", base_url="http://front/v1", http_client=front.http)
    for seed, thought in ((5000, "<think>Which?</think>\n"), (5001, "")):
        SCRIPTS[seed] = (thought + '{"city": "Rome", "days": 3} and more',)
        response = front.run(
            client.responses.parse(
                model="fake", input="hi", text_format=Answer, extra_body={"seed": seed}
            )
        )
        assert response.output_parsed == Answer(city="Rome", days=3)
        assert response.text.format.type == "json_schema" and response.text.format.strict
        assert [item.type for item in response.output][:-1] == ["reasoning"] * bool(thought)
    SCRIPTS[5002] = ('{"a": 1} and more',)
    any_object = front.ok(
        PATH, {"input": "hi", "seed": 5002, "text": {"format": {"type": "json_object"}}}
    )
    assert any_object["output"][0]["content"][0]["text"] == '{"a": 1}'


def test_a_conversation_by_its_items(front):
    first = ask(front, f"<think>Hm.</think>{PARIS}", tools=TOOLS)
    call = first.output[-1]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    second = ask(front, "It rains.", input=items, tools=TOOLS)
    assert second.output_text == "It rains."
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
    ]
    chat_tools = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in TOOLS
    ]
    prompt = front.ok("/tokenize", {"messages": messages, "tools": chat_tools})
    assert second.usage.input_tokens == prompt["count"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(front, stream):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    made = ask(front, "Hello.", stream=stream, **options)
    if stream:
        entries = [
            entry
            for event in made
            if event.type == "response.output_text.delta"
            for entry in event.logprobs
        ]
        made = made[-1].response
        assert "".join(entry.token for entry in entries) == "Hello."
    logprobs = made.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == "Hello."
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)


@pytest.mark.parametrize(
    "text", [f"<think>Hm.</think>Well, no.\n{PARIS}", "a <tool_call> b", f"Well.{PARIS}"]
)
def test_log_probabilities_beside_reasoning_and_calls(front, text):
    """Of the words alone, and the same in a stream."""
    options = {"include": ["message.output_text.logprobs"], "tools": TOOLS}
    found, told = [], []
    for stream in (False, True):
        made = ask(front, text, stream=stream, **options)
        if stream:
            deltas = [e for e in made if e.type == "response.output_text.delta"]
            told = [entry.token for delta in deltas for entry in delta.logprobs]
            made = made[-1].response
        (part,) = next(item for item in made.output if item.type == "message").content
        found.append([entry.token for entry in part.logprobs])
        assert "".join(found[-1]) == part.text and part.text
    assert found[0] == found[1] == told


def test_tokens_without_text_of_their_own_keep_their_log_probabilities():
    """Half of a character shows with its other half, or with the end."""
    wire = ResponseWire({"model": "fake"}, ByteTokenizer(), 0, reads=False)
    entries = [TokenLogprobs(token_id=token, logprob=-1.0, rank=0) for token in "éé".encode()]
    said = wire.events(Delta(0, "", logprobs=entries[:1]))
    said += wire.events(Delta(0, "é", logprobs=entries[1:2]))
    said += wire.events(Delta(0, "", logprobs=entries[2:3])) + wire.ending(Usage(prompt_tokens=1))
    events = [json.loads(line[6:]) for line in said.decode().splitlines() if line[:5] == "data:"]
    (part,) = events[-1]["response"]["output"][0]["content"]
    assert [entry["bytes"] for entry in part["logprobs"]] == [[195], [169], [195]]


def test_a_failure_in_a_stream_is_an_event():
    wire = ResponseWire({"model": "fake"}, ByteTokenizer(), None, reads=False)
    said = wire.events(Delta(0, "Hel")) + wire.failure(DeviceFailure("it broke"))
    events = [json.loads(line[6:]) for line in said.decode().splitlines() if line[:5] == "data:"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "it broke"}
    (message,) = last["response"]["output"]
    assert message["status"] == "incomplete" and message["content"][0]["text"] == "Hel"


def item(**fields: Any) -> dict[str, Any]:
    """A request with one item."""
    return {"input": [fields]}


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "null"),
    ({"input": []}, "input", "list of 0"),
    ({"input": 5}, "input", "5"),
    ({"input": [5]}, "input[0]", "5"),
    (item(type="item_reference", id="x"), "input[0].type", "item_reference"),
    (item(role="tool", content="x"), "input[0].role", "tool"),
    (item(role="user"), "input[0].content", "null"),
    (item(role="user", content=[{"type": "input_image"}]), "input[0].content[0].type", "image"),
    (item(role="user", content="x", nmae="y"), "input[0].nmae", "unknown"),
    (item(**CALL | {"call_id": None}), "input[0].call_id", "null"),
    (item(**CALL | {"arguments": 5}), "input[0].arguments", "5"),
    (item(type="function_call_output", call_id="1"), "input[0].output", "null"),
    (item(type="function_call_output", output="x"), "input[0].call_id", "null"),
    (item(type="reasoning", encrypted_content="x"), "input[0].encrypted_content", "x"),
    (item(type="reasoning", content=[{"type": "x"}]), "input[0].content[0].type", "x"),
    ({"instructions": 5}, "instructions", "5"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "null"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "x"),
    ({"tools": [TOOLS[1] | {"name": f"t{n}"} for n in range(500)]}, "tools", "list of 500"),
    ({"store": True}, "store", "not stored"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "not stored"),
    ({"conversation": "x"}, "conversation", "not stored"),
    ({"background": True}, "background", "not supported"),
    ({"truncation": "auto"}, "truncation", "auto"),
    ({"prompt": {"id": "x"}}, "prompt", "not supported"),
    ({"max_tool_calls": 3}, "max_tool_calls", "3"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort", "high"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]", "encrypted"),
    ({"include": "x"}, "include", "list"),
    ({"top_logprobs": 5}, "top_logprobs", "include"),
    ({"max_output_tokens": 0}, "max_output_tokens", "0"),
    ({"max_output_tokens": 10_000}, "max_output_tokens", "8192"),
    ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
    ({"n": 2}, "n", "2"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "not part"),
    ({"return_token_ids": True}, "return_token_ids", "not part"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages", "unknown"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "null"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": 5}}},
        "text.format.schema",
        "5",
    ),
    ({"text": {"verbosity": "high"}}, "text.verbosity", "high"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "true",
    ),
    ({"temperature": 3}, "temperature", "3"),
    ({"input": "x" * 9000}, "input", "8192"),
]


@pytest.mark.parametrize(
    ("fields", "param", "words"), WRONG, ids=[f"{i}-{p}" for i, (_, p, _) in enumerate(WRONG)]
)
def test_what_is_wrong_is_named(front, fields, param, words):
    response = front.post(PATH, {"input": "hi"} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"]


def test_what_asks_for_nothing_is_accepted(front):
    fields = {
        "store": False, "background": False, "truncation": "disabled", "previous_response_id": None,
        "reasoning": {"effort": None}, "include": [], "text": {"format": {"type": "text"}},
        "service_tier": "auto", "n": 1, "max_tool_calls": None, "prompt_cache_key": "k",
    }  # fmt: skip
    assert front.ok(PATH, {"input": "hi", "max_output_tokens": 1} | fields)["status"]


def test_after_all_that_nothing_is_held(front):
    status = front.run(front.client.get_status())
    assert (status.running, status.waiting, status.pages_used) == (0, 0, 0)
