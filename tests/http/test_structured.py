"""Structured output over HTTP: each parameter, each way to be wrong, and hostile grammars."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from dataclasses import replace

import jsonschema
import pytest

from jaxserve.config import StructuredConfig
from tests.http.frontend import CONFIG, Front, front

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
HTTP = replace(CONFIG.http, max_body_bytes=12_000_000)
#: No finite JSON matches it.
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 120}
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<fn=add>", "schema": PERSON, "end": "</fn>"}],
    "triggers": ["<fn="],
}


@pytest.fixture(scope="module")
def shared():
    """One application: its child that checks grammars takes a second to start."""
    with front(HTTP, structured=StructuredConfig(check_timeout_s=2.0)) as made:
        yield made


def chat(shared: Front, **values) -> str:
    document = shared.ok("/v1/chat/completions", CHAT | values)
    (choice,) = document["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


def test_response_format_json_schema(shared: Front) -> None:
    for seed in range(4):
        answer = json.loads(chat(shared, response_format=NAMED, seed=seed))
        jsonschema.validate(answer, PERSON)


def test_response_format_text_and_json_object(shared: Front) -> None:
    assert chat(shared, response_format={"type": "text"}, seed=3) == chat(shared, seed=3)
    document = shared.ok(
        "/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}
    )
    choice = document["choices"][0]
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{4,9}"}}, "[a-c]{4,9}"),
        ({"guided_regex": "x[0-9]+y"}, "x[0-9]+y"),
        ({"structured_outputs": {"choice": ["yes", 'n"o', "é/"]}}, 'yes|n"o|é/'),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: "a" (B | "c")+\nB: /b{2}/'}, "a(bb|c)+"),
        ({"structured_outputs": {"grammar": 'root ::= "q" [0-9]+'}}, "q[0-9]+"),
        ({"guided_json": PERSON}, r"\{[\s\S]*\}"),
        ({"guided_json": json.dumps(PERSON)}, r"\{[\s\S]*\}"),
        (
            {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
            r'\{"name":"(Ada|Bob)","age":-?[0-9]+\}',
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_vllm_s_parameters(shared: Front, path: str, values: dict, pattern: str) -> None:
    body = {"max_tokens": 200, "seed": 5} | values
    if path == "/v1/completions":
        (choice,) = shared.ok(path, body | {"prompt": "Say"})["choices"]
        text = choice["text"]
    else:
        (choice,) = shared.ok(path, CHAT | body)["choices"]
        text = choice["message"]["content"]
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, text)
    else:
        assert (choice["finish_reason"] == "length" and "+" in pattern) or "*" in pattern


def test_streams_and_choices(shared: Front) -> None:
    body = CHAT | {"response_format": NAMED, "n": 3, "seed": 1}
    whole = [c["message"]["content"] for c in shared.ok("/v1/chat/completions", body)["choices"]]
    streamed = ["", "", ""]
    response = shared.post("/v1/chat/completions", body | {"stream": True})
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == whole and len(set(whole)) > 1
    for text in whole:
        jsonschema.validate(json.loads(text), PERSON)


def test_structural_tags(shared: Front) -> None:
    """A tag that is begun is carried through."""
    for seed in range(3):
        body = CHAT | {"response_format": TAGS, "seed": seed, "logit_bias": {str(60): 100}}
        (choice,) = shared.ok("/v1/chat/completions", body)["choices"]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            for call in re.findall("<fn=(.*?)</fn>", text, re.DOTALL):
                jsonschema.validate(json.loads(call.removeprefix("add>")), PERSON)


def test_length_says_length(shared: Front) -> None:
    body = CHAT | {"response_format": NAMED, "max_tokens": 5}
    assert shared.ok("/v1/chat/completions", body)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("values", "said", "param"),
    [
        ({"response_format": {"type": "xml"}}, "json_schema", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema", None),
        ({"response_format": NAMED | {"strictt": True}}, "strictt", None),
        ({"structured_outputs": {}}, "none", "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "choice", "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "JSON", None),
        ({"guided_regex": "a", "response_format": NAMED}, "exclude", "guided_regex"),
        ({"guided_regex": ""}, "empty", "guided_regex"),
        ({"guided_choice": []}, "at least one", "guided_choice"),
        ({"guided_choice": [1]}, "strings", "guided_choice"),
        ({"guided_json": {"not": {}}}, "not", "guided_json"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems", "guided_json"),
        ({"guided_json": {"type": "string", "format": "moon"}}, "moon", "guided_json"),
        ({"guided_json": {"if": {}, "then": {}}}, "if", "guided_json"),
        ({"guided_json": {"$ref": "#/nowhere"}}, "nowhere", "guided_json"),
        ({"guided_json": {"$ref": "http://example.com/x"}}, "example.com", "guided_json"),
        ({"guided_json": False}, "", "guided_json"),
        ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum", None),
        ({"guided_regex": "("}, "regex", "guided_regex"),
        ({"guided_regex": "(a|aa|aaa){200}"}, "too many expressions", "guided_regex"),
        ({"guided_regex": "[a-z](a|aa|aaa){200}"}, "too complex", "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "nothing", "guided_grammar"),
        ({"guided_grammar": "root ::= ("}, "EBNF", "guided_grammar"),
        ({"guided_grammar": "start: X\nX: /a/ & /b/"}, "admits no output", "guided_grammar"),
        ({"guided_json": ENDLESS}, '"$ref": "#" never ends', "guided_json"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": ENDLESS, "strict": True},
                    }
                ]
            },
            "never ends",
            "tools[0].function.parameters",
        ),
        ({"guided_grammar": 'start[temperature=0.5]: "a"'}, "'temperature'", "guided_grammar"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "ignore_eos"),
        ({"response_format": TAGS | {"triggers": ["<x"]}}, "triggers", None),
        ({"response_format": TAGS | {"triggers": [""]}}, "strings that are not empty", None),
    ],
)
def test_what_is_wrong_is_named(shared: Front, values: dict, said: str, param: str | None) -> None:
    response = shared.post("/v1/chat/completions", CHAT | values)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert said in error["message"], error
    assert param is None or error["param"] == param


def test_a_client_s_options_switch_nothing_off(shared: Front) -> None:
    schema = PERSON | {"not": {"type": "string"}, "x-guidance": {"lenient": True}}
    response = shared.post("/v1/chat/completions", CHAT | {"guided_json": schema})
    assert response.status_code == 400 and "not" in response.text


def _deep_ref() -> dict:
    """Each definition holds the next one twice."""
    defs = {f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    return {"$defs": defs | {"d40": {"type": "null"}}, "$ref": "#/$defs/d0"}


def _nested(keyword: str, depth: int, width: int) -> dict:
    schema: dict = {"type": "string"}
    for level in range(depth):
        schema = {
            keyword: [
                {"properties": {f"p{level}_{i}": schema}, "required": [f"p{level}_{i}"]}
                for i in range(width)
            ]
        }
    return schema


HOSTILE = {
    "recursive $ref": {"guided_json": {"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}},
    "doubling $ref": {"guided_json": _deep_ref()},
    "exponential regex": {"guided_regex": "((a?){64}a{64}){64}" * 30},
    "large repetition": {"guided_regex": "(((.{1,999}x){1,999}y){1,999}z){1,999}"},
    "many choices": {"guided_choice": [f"{i:x}" * 50 for i in range(1000)]},
    "long pattern": {"guided_regex": "(ab|cd*)" * 5000},
    "deep nesting": {"guided_grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
    "deep EBNF": {"guided_grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000},
    "ten megabytes": {
        "guided_json": {"properties": {f"p{i}": {"title": "x" * 99} for i in range(85_000)}}
    },
    "five hundred tools": {
        "response_format": TAGS
        | {"structures": [TAGS["structures"][0] | {"begin": f"<fn=f{i}>"} for i in range(500)]}
    },
    "an automaton of 2^18 states": {"guided_grammar": "start: X\nX: ~/(a|b)*a(a|b){18}/"},
    "eighteen automata at once": {
        "guided_grammar": "start: X\nX: "
        + " & ".join(f"/(a|b)*{c}(a|b){{{i}}}/" for i, c in enumerate("ab" * 9))
    },
    "hundreds of patterns": {
        "guided_json": {"patternProperties": {f"^a{{{i},}}.*b{i}$": {} for i in range(1, 60)}}
    },
    "ambiguity": {"guided_grammar": 'start: start start | "a" | ""'},
    "nested anyOf": {"guided_json": _nested("anyOf", 5, 4)},
    "nested oneOf": {
        "guided_json": {
            "oneOf": [
                {"properties": {f"p{i}": {"oneOf": [{"const": j} for j in range(30)]}}}
                for i in range(30)
            ]
        }
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_answered_in_time(shared: Front, name: str) -> None:
    """Served or refused within five seconds; and the next one is served as if nothing had been."""
    shared.ok("/v1/chat/completions", CHAT | {"guided_regex": "[ab]{3}"})  # the child is there
    begun_s = time.monotonic()
    response = shared.post("/v1/chat/completions", CHAT | {"max_tokens": 5} | HOSTILE[name])
    took_s = time.monotonic() - begun_s
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["code"] == "invalid_grammar"
    assert took_s < 5.0, f"{took_s:.1f} s"
    assert chat(shared, guided_regex="[ab]{3}") != ""


def test_the_child_that_dies_is_started_again(shared: Front) -> None:
    chat(shared, guided_regex="[ab]{3}")
    child = shared.app.frontend.grammars._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    response = shared.post("/v1/chat/completions", CHAT | {"guided_regex": "[abc]{3}"})
    assert response.status_code in (200, 400)  # it may have died while it checked this one
    assert chat(shared, guided_regex="[abcd]{3}") != ""


def test_streams_go_on_while_a_grammar_is_checked() -> None:
    """Free ones, those whose grammars are known, and new small ones."""
    path = "/v1/chat/completions"
    known = CHAT | {"guided_regex": "[ab]{9}", "stream": True, "seed": 1}

    async def both(own: Front) -> None:
        checked = asyncio.create_task(own.http.post(path, json=CHAT | large_schema(0, 9_000)))
        await asyncio.sleep(0)
        streamed = await own.http.post(path, json=known)
        free = await own.http.post(path, json=CHAT | {"seed": 2})
        new = await own.http.post(path, json=CHAT | {"guided_regex": "[ab]{10}"})
        assert not checked.done()
        assert free.status_code == new.status_code == 200
        assert _contents(streamed.text) == _contents(before) != ""
        refused = await checked
        assert refused.status_code == 400 and "longer than" in refused.text

    with front(HTTP, structured=StructuredConfig(max_properties=100_000)) as own:
        before = own.post(path, known).text
        own.run(both(own))


def test_many_large_schemas_are_refused_at_once(shared: Front) -> None:
    """However they come: none is compiled."""

    async def ask(number: int) -> str:
        body = CHAT | large_schema(number, 12_000)
        response = await shared.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        return response.json()["error"]["message"]

    async def all_of_them() -> set[str]:
        return set(await asyncio.gather(*map(ask, range(12))))

    chat(shared, guided_regex="[ab]{3}")  # the child is there
    begun_s = time.monotonic()
    assert shared.run(all_of_them()) == {
        "guided_json: the schema has 12000 properties, the limit is 5000; send fewer, or raise "
        "structured.max_properties"
    }
    assert time.monotonic() - begun_s < 5.0


def large_schema(name: int, size: int) -> dict:
    """Takes seconds to compile, by the square of its size."""
    return {"guided_json": {"properties": {f"p{name}_{index}": {} for index in range(size)}}}


def _contents(events: str) -> str:
    lines = [line[6:] for line in events.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
