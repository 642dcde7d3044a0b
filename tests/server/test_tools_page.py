"""The examples of docs/tools.md, against the embedded model, and calls of it in all ways."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from tests.server.conftest import Server

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent.parent / "docs" / "tools.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
#: The other one is run by tests/test_offline_messages.py.
EXAMPLES = [block for block in BLOCKS if "OpenAI(" in block]
MODEL = "smollm2-135m-instruct"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 16},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": SCHEMA,
        },
    }
]
QUESTION: list[Any] = [{"role": "user", "content": "How will the weather be in Paris?"}]


def run(example: str, server: Server) -> None:
    """Runs an example of the page, and closes its client."""
    names: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:8000", server.base_url), names)
    names["client"].close()


def test_the_example_of_tools(server: Server, capsys) -> None:
    run(EXAMPLES[0], server)
    called, answer = capsys.readouterr().out.split("\n", 1)
    name, _, arguments = called.partition(" ")
    assert name == "get_weather" and len(json.loads(arguments)["city"]) <= 20
    assert answer.strip()


def test_the_example_of_responses(server: Server, capsys) -> None:
    run(EXAMPLES[1], server)
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert len(text) > 20 and re.fullmatch(r" \d+ tokens", last)


@pytest.mark.parametrize("stream", [False, True])
def test_every_call_matches_its_schema(client: OpenAI, stream: bool) -> None:
    request: dict[str, Any] = {
        "model": MODEL, "messages": QUESTION, "tools": TOOLS, "tool_choice": "required",
        "n": 4, "seed": 5, "temperature": 1.5, "max_tokens": 200, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**request)
    calls = [call.function for choice in whole.choices for call in choice.message.tool_calls or ()]
    assert len(calls) == 4
    assert {choice.finish_reason for choice in whole.choices} == {"tool_calls"}
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
    if not stream:
        return
    texts = ["", "", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                texts[choice.index] += call.function.arguments
    assert texts == [call.arguments for call in calls], "the same seed, streamed"


def test_parsed_by_the_client(client: OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL,
        input="How will the weather be in Paris?",
        tools=[{"strict": True, "type": "function", **TOOLS[0]["function"]}],
        tool_choice={"type": "function", "name": "get_weather"},
        temperature=0,
        max_output_tokens=200,
    )
    (call,) = answer.output
    assert call.type == "function_call" and answer.status == "completed"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)


def test_nothing_was_compiled_for_it(server: Server) -> None:
    assert server.metrics()["jaxserve_compiles_after_warmup"] == 0
