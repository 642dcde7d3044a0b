"""Each form an answer can be held to, of the embedded model through the whole server, and checked.

The prompts show the model examples that it goes on with: it ends by itself, and begins structures.
What they show breaks the schema, so that only what is held to it does not.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.server.conftest import Server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"


class City(BaseModel):
    name: str = Field(max_length=12)
    country: Literal["France", "Italy"]
    inhabitants: int = Field(ge=0, le=99_999_999)


def object_of(**properties: Any) -> dict[str, Any]:
    """The schema of an object with exactly these."""
    names = list(properties)
    shape = {"type": "object", "properties": properties, "required": names}
    return shape | {"additionalProperties": False}


def turns(*pairs: tuple[str, str], then: str) -> list[Any]:
    """Questions with their answers, and a last question."""
    roles = [("user", "assistant")] * len(pairs)
    said = [
        {"role": role, "content": text}
        for both, pair in zip(roles, pairs, strict=True)
        for role, text in zip(both, pair, strict=True)
    ]
    return [*said, {"role": "user", "content": then}]


def valid(schema: dict[str, Any]) -> Callable[[str], object]:
    """Raises where a text is not JSON of the schema."""
    return lambda text: jsonschema.validate(json.loads(text), schema)


def sums(text: str) -> None:
    """Only what the grammar has; Python says whether its parentheses are balanced."""
    assert re.fullmatch(r"[0-9()+-]+", text)
    ast.parse(text, mode="eval")


def matches(pattern: str) -> Callable[[str], object]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


LARK = """start: "The " NOUN " is " /[a-z]{3,8}/ (" and " /[a-z]{3,8}/)? "."
NOUN: "city" | "river"
"""
#: What no regular expression says: parentheses in parentheses.
SUMS = """start: "(" sum ")" sign term
sum: term (sign term){0,2}
term: NUMBER | "(" sum ")"
sign: "+" | "-"
NUMBER: /[1-9][0-9]?/
"""
DIGITS = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 4}
NOUNS = matches("The (city|river) is [a-z]{3,8}( and [a-z]{3,8})?[.]")
HELD: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"structured_outputs": {"grammar": LARK}}, NOUNS),
    ({"structured_outputs": {"grammar": SUMS}}, sums),
    ({"guided_grammar": LARK}, NOUNS),
    ({"guided_grammar": 'root ::= "It is " [1-9] ":" [0-5] [0-9]'}, matches(r"It is \d:[0-5]\d")),
    ({"guided_regex": r"[A-Z][a-z]{2,6}, [0-9]{4}"}, matches("[A-Z][a-z]{2,6}, [0-9]{4}")),
    ({"guided_choice": ["Paris", "Par", "日本 ☕"]}, ["Paris", "Par", "日本 ☕"].index),
    ({"guided_json": DIGITS}, valid(DIGITS)),
    ({"guided_json": json.dumps(DIGITS)}, valid(DIGITS)),
]


@pytest.mark.parametrize(
    ("extra", "check"), HELD, ids=[f"{i}-{next(iter(e))}" for i, (e, _) in enumerate(HELD)]
)
def test_grammars_by_all_their_names(client: OpenAI, extra: dict[str, Any], check: Any) -> None:
    messages = turns(then="What about (1+2)-(3+4)?")
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=60, n=3, seed=1, extra_body=extra
    )
    stopped = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert stopped
    for choice in stopped:
        check(choice.message.content)


def test_json_object(client: OpenAI) -> None:
    """What stops is an object; what is cut says so."""
    shown = [(f"City: {city}", f'Sure: {{"city": "{city}"}}') for city in ("Rome", "Oslo", "Bern")]
    asked: dict[str, Any] = {"model": MODEL, "messages": turns(*shown, then="City: Paris"), "n": 4}
    held = asked | {"response_format": {"type": "json_object"}, "seed": 2}
    choices = client.chat.completions.create(**held, max_tokens=30).choices
    choices += client.chat.completions.create(**held, max_tokens=3).choices
    found = {choice.finish_reason for choice in choices}
    assert found == {"stop", "length"}
    for choice in choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)
    (free, *_) = client.chat.completions.create(**asked, max_tokens=8, temperature=0).choices
    assert (free.message.content or "").startswith("Sure")


def test_a_structure_that_the_model_begins_is_held_to(client: OpenAI) -> None:
    """Its examples call the numbers a and b, the schema calls them x and y."""
    shown = [
        (f"Add {a} and {b}.", f'Sure: <fn=add>{{"a": {a}, "b": {b}}}</fn>')
        for a, b in ((1, 2), (3, 4), (7, 5))
    ]
    number = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = object_of(x=number, y=number)
    tag: Any = {
        "type": "structural_tag",
        "structures": [{"begin": "<fn=add>", "schema": schema, "end": "</fn>"}],
        "triggers": ["<fn="],
    }
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "temperature": 0}
    asked["messages"] = turns(*shown, then="Add 6 and 9.")
    free, held = (
        client.chat.completions.create(**asked | more).choices[0]
        for more in ({}, {"response_format": tag})
    )
    free_text, text = free.message.content or "", held.message.content or ""
    before, begun, rest = text.partition("<fn=add>")
    assert begun and free_text.startswith(before + begun), "free until its trigger"
    assert held.finish_reason == "stop"
    valid(schema)(rest.partition("</fn>")[0])
    with pytest.raises(jsonschema.ValidationError):
        valid(schema)(free_text.partition("<fn=add>")[2].partition("</fn>")[0])


CITY = City.model_json_schema() | {"additionalProperties": False}
STRICT: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
PARIS = "Tell me about the city of Paris, as JSON."


@pytest.mark.parametrize(("limit", "status"), [(150, "completed"), (8, "incomplete")])
def test_responses_of_a_schema(client: OpenAI, limit: int, status: str) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "input": PARIS, "text": STRICT, "max_output_tokens": limit,
        "temperature": 0.7, "extra_body": {"seed": 3},
    }  # fmt: skip
    whole = client.responses.create(**asked)
    *events, last = client.responses.create(**asked, stream=True)
    assert whole.status == status and last.type == f"response.{status}"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == last.response.output_text
    for response in (whole, last.response):
        if status == "completed":
            valid(CITY)(response.output_text)
            assert response.incomplete_details is None
        else:
            assert response.incomplete_details.reason == "max_output_tokens"
            assert response.usage.output_tokens == limit


def test_responses_parsed_by_the_client(client: OpenAI) -> None:
    response = client.responses.parse(
        model=MODEL, input=PARIS, text_format=City, temperature=0, max_output_tokens=150
    )
    assert isinstance(response.output_parsed, City)
    assert response.output_parsed == City.model_validate_json(response.output_text)


def test_an_adapters_answer_is_held_to(client: OpenAI) -> None:
    schema = object_of(greeting={"type": "string", "maxLength": 40}, mood={"enum": ["merry"]})
    held: Any = {"type": "json_schema", "json_schema": {"name": "greeting", "schema": schema}}
    texts: dict[str, list[str | None]] = {}
    for model in ("pirate", "pirate", MODEL):
        (choice,) = client.chat.completions.create(
            model=model, messages=turns(then="Greet me."), response_format=held,
            temperature=0, max_tokens=80,
        ).choices  # fmt: skip
        texts.setdefault(model, []).append(choice.message.content)
        valid(schema)(choice.message.content or "")
    first, again = texts["pirate"]
    assert first == again and first != texts[MODEL][0], "the adapter speaks, not the base"


def test_scores(server: Server) -> None:
    """What is near scores above what is far, one with several and pair by pair."""

    def scores(first: Any, second: Any) -> list[float]:
        body = {"text_1": first, "text_2": second}
        answer = httpx.post(f"{server.base_url}/v1/score", json=body).json()
        assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
        return [entry["score"] for entry in answer["data"]]

    query = "How wide is the ocean?"
    texts = ["Taxes are due in April.", "The sea is wide.", "Marmalade is sweet."]
    far, near, other = scores(query, texts)
    assert near > 0.6 > 0.2 > max(far, other)
    assert scores([query, query], texts[:2]) == pytest.approx([far, near], abs=1e-6)
    assert scores(texts[1:], [query, texts[2]]) == pytest.approx([near, 1], abs=1e-6)
    body = {"text_1": [query] * 2, "text_2": texts}
    response = httpx.post(f"{server.base_url}/v1/score", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "text_2")
    assert "2 texts and text_2 3" in error["message"]


def test_nothing_was_compiled_for_it(server: Server) -> None:
    assert server.metrics()["jaxserve_compiles_after_warmup"] == 0
