"""Structured output of the embedded model through the whole server, with the `openai` client."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from tests.server.conftest import TIMEOUT_S, Server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "Tell me about the city of Paris, as JSON."}]


class City(BaseModel):
    """Bounded: so small a model goes on for ever where it may."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy"]
    inhabitants: int = Field(ge=0, le=99_999_999)
    sights: list[Literal["river", "tower", "museum"]] = Field(max_length=3)


def test_parse_of_the_openai_client(client: OpenAI) -> None:
    """Pydantic's schema goes out; an object of the class comes back."""
    for seed in range(2):
        completion = client.chat.completions.parse(
            model=MODEL, messages=QUESTION, response_format=City, max_tokens=400, seed=seed,
            temperature=0.5, logprobs=True, top_logprobs=1,
        )  # fmt: skip
        (choice,) = completion.choices
        assert choice.finish_reason == "stop"
        city = choice.message.parsed
        assert isinstance(city, City) and city.country in ("France", "Italy")
        assert len(choice.logprobs.content) == completion.usage.completion_tokens


def test_streamed_beside_free_rows_without_compiling(server: Server, client: OpenAI) -> None:
    """Alone and streamed: the same text; and nothing is compiled for it."""
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 300, "seed": 4, "n": 2}
    schema = City.model_json_schema()
    held = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    free = client.chat.completions.create(**asked | {"max_tokens": 40}, stream=True)
    texts = ["", ""]
    with client.chat.completions.create(**asked, response_format=held, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
    free.close()
    whole = client.chat.completions.create(**asked, response_format=held)
    assert [choice.message.content for choice in whole.choices] == texts
    assert server.metrics()["jaxserve_compiles_after_warmup"] == 0


def test_regex_choice_and_grammar(client: OpenAI) -> None:
    for extra, pattern in (
        ({"regex": r"[0-9]{4}-[0-9]{2}-[0-9]{2}"}, r"\d{4}-\d{2}-\d{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "The answer is " [1-9] "."'}, r"The answer is \d\."),
    ):
        completion = client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=40, extra_body={"structured_outputs": extra}
        )
        assert re.fullmatch(pattern, completion.choices[0].message.content)


def test_a_wrong_schema_is_refused_by_name(client: OpenAI) -> None:
    schema = {"type": "array", "uniqueItems": True}
    held = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(BadRequestError, match="uniqueItems") as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, response_format=held)
    assert caught.value.param == "response_format"


#: What the answer's status must be, and what asks.
HOSTILE: dict[str, tuple[int, dict[str, Any]]] = {
    "recursive $ref": (
        400,
        {"json": {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}},
    ),
    "exponential regex": (400, {"regex": "(a|aa|aaa){200}"}),
    "admits nothing": (400, {"regex": r"[^\s\S]"}),
    "12,000 properties": (
        400,
        {"json": {"properties": {f"property {i}": {"type": "string"} for i in range(12_000)}}},
    ),
    "a body of 10 MB": (413, {"json": {"enum": [f"{i:0100}" for i in range(100_000)]}}),
}


def test_hostile_grammars_disturb_no_stream(server: Server, client: OpenAI) -> None:
    """Each is refused within five seconds, beside streams that bring what they bring alone."""
    prompt = {"model": MODEL, "prompt": "The history of bread", "max_tokens": 150}
    greedy = prompt | {"temperature": 0, "extra_body": {"ignore_eos": True}}

    def stream() -> str:
        with client.completions.create(**greedy, stream=True) as chunks:
            return "".join(choice.text for chunk in chunks for choice in chunk.choices)

    alone = stream()
    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(stream) for _ in range(3)]
        for name, (status, grammar) in HOSTILE.items():
            begun_s = time.monotonic()
            body = prompt | {"max_tokens": 5, "structured_outputs": grammar}
            response = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60)
            assert response.status_code == status, (name, response.text[:200])
            assert time.monotonic() - begun_s < 5, name
        raw = b'{"model": "smollm2-135m-instruct", "prompt": "\xff\xfe"}'
        json_type = {"content-type": "application/json"}
        response = httpx.post(f"{server.base_url}/v1/completions", content=raw, headers=json_type)
        assert response.status_code == 400, response.text
        assert [result.result() for result in streams] == [alone] * 3


def test_a_stream_outlives_the_engine(server: Server, client: OpenAI) -> None:
    """The vocabulary is told to the next engine, and the grammar goes on where the output was."""
    schema = City.model_json_schema()
    held = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 300, "seed": 9, "temperature": 0.7}
    whole = client.chat.completions.create(**asked, response_format=held)
    text = ""
    with client.chat.completions.create(**asked, response_format=held, stream=True) as stream:
        for number, chunk in enumerate(stream):
            if number == 4:
                health = httpx.get(f"{server.base_url}/health").json()
                os.kill(health["engines"][0]["pid"], signal.SIGKILL)
            for choice in chunk.choices:
                text += choice.delta.content or ""
    assert text == whole.choices[0].message.content
    jsonschema.validate(json.loads(text), schema)
    deadline_s = time.monotonic() + TIMEOUT_S
    while httpx.get(f"{server.base_url}/ready").status_code != 200:
        assert time.monotonic() < deadline_s
