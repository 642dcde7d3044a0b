"""What compiles and is refused all the same."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from jaxserve.errors import GrammarError
from jaxserve.structured import grammars
from jaxserve.structured.grammars import Tag, tagged
from jaxserve.structured.scrutiny import scrutinise
from jaxserve.types import Grammar

ENDLESS = {
    "type": "object",
    "properties": {"next": {"$ref": "#"}},
    "required": ["next"],
}
MASKBENCH = Path(__file__).parents[1] / "data" / "maskbench.jsonl"


@pytest.mark.parametrize(
    "grammar",
    [
        grammars.json_schema(ENDLESS),
        grammars.json_schema({"$id": "https://example.org/x", **ENDLESS}),
        tagged([Tag(begin="<a>", schema=ENDLESS, end="</a>")]),
        Grammar(kind="lark", text='start: "%json" %json ' + json.dumps(ENDLESS) + ' "!"'),
        Grammar(kind="lark", text="start: %json\n" + json.dumps(ENDLESS, indent=1)),
    ],
)
def test_an_endless_schema_names_its_keyword(grammar: Grammar) -> None:
    with pytest.raises(GrammarError, match=r'"\$ref": "#" never ends'):
        scrutinise(grammar)


@pytest.mark.parametrize(
    ("text", "attribute"),
    [
        ('start[temperature=0.5]: "a"', "temperature"),
        ('start: x\nx[lazy, temperature = 1]: /a+/', "temperature"),
        ('start: x\n?x[stop="]:", temperature=1]: /a+/', "temperature"),
        ('start[capture]: "a"', "capture"),
        ('start[capture="x"]: "a"', "capture"),
        ('start: "a" [y]\ny[stop_capture="z", stop="b"] : /a+/', "stop_capture"),
        ('start: "a"  // it\'s x[lazy]: here\nx[max_tokens=5,temperature=0]: "b"', "temperature"),
    ],
)  # fmt: skip
def test_attributes_without_effect(text: str, attribute: str) -> None:
    with pytest.raises(GrammarError, match=f"the attribute '{attribute}' of rule"):
        scrutinise(Grammar(kind="lark", text=text))


@pytest.mark.parametrize(
    "grammar",
    [
        grammars.json_object(),
        grammars.json_schema({"$defs": {"a": {"$id": "#a", **ENDLESS}}, "$ref": "#/$defs/a"}),
        grammars.regex("x[temperature=1]:"),
        grammars.choice(["x[temperature=1]: y", '%json {"$ref": "#"}']),
        grammars.context_free('start[lazy]: /a+/\nx[max_tokens=3, stop="b"]: /[capture]:/'),
        grammars.context_free('start: temperature [capture] ":"\ncapture: "a"\ntemperature: "b"'),
        grammars.context_free("# x[temperature=1]: y\nstart: /x[temperature=1]:/"),
        grammars.context_free('start: "a" // x[temperature=1]:'),
        grammars.context_free('root ::= "a" ("b" | [0-9]+)'),
        Grammar(kind="lark", text="start: %json {"),
        Grammar(kind="json_schema", text='{"$ref": '),
    ],
)
def test_what_is_left_to_the_compiler(grammar: Grammar) -> None:
    scrutinise(grammar)


def test_schemas_of_the_real_world_are_not_endless() -> None:
    lines = MASKBENCH.read_text(encoding="utf-8").splitlines()
    schemas = [json.loads(line)["schema"] for line in lines]
    recursive = [schema for schema in schemas if '"$ref"' in json.dumps(schema)]
    assert len(recursive) > 20
    for schema in recursive:
        scrutinise(grammars.json_schema(schema))


def test_takes_time_in_proportion() -> None:
    """Of what looks like the beginning of something, again and again."""
    openings = ("[", "x[", "a: b\n", '"', "%json {", "/", "x[lazy, ", "<", "]:", r"\/", r"\"")
    for piece in openings:
        start_s = time.thread_time()
        scrutinise(Grammar(kind="lark", text="/" + piece * (200_000 // len(piece))))
        scrutinise(Grammar(kind="lark", text='"' + piece * (200_000 // len(piece))))
        assert time.thread_time() - start_s < 3, piece


@pytest.mark.parametrize(
    ("num", "schema"),
    [
        (31, {"properties": {f"p{i}": {} for i in range(31)}}),
        (32, {"properties": {f"p{i}": {"properties": {"a": {}}} for i in range(16)}}),
        (31, {"anyOf": [{"items": {"properties": {f"p{i}": {} for i in range(31)}}}]}),
    ],
)
def test_schemas_of_too_many_properties(num: int, schema: dict) -> None:
    grammar = grammars.json_schema(schema)
    tag = tagged([Tag(begin="<a>", schema=schema, end="</a>")])
    said = f"the schema has {num} properties, the limit is 30; .* structured.max_properties"
    for own in (grammar, tag):
        with pytest.raises(GrammarError, match=said):
            scrutinise(own, max_properties=30)
        scrutinise(own, max_properties=num)
        scrutinise(own)
