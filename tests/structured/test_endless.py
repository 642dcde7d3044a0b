"""Which schemas have no finite instance."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.structured.endless import endless_reference


def node(**more: Any) -> dict[str, Any]:
    """An object that needs `next`."""
    return {"type": "object", "required": ["next"], **more}


SELF = {"$ref": "#"}
CHAIN = {"$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("schema", "reference"),
    [
        (node(properties={"next": SELF}), "#"),
        (node(additionalProperties=SELF), "#"),
        (node(properties={"next": {"anyOf": [SELF, SELF]}}), "#"),
        (node(properties={"next": {"allOf": [{"type": "object"}, SELF]}}), "#"),
        ({"type": "array", "items": SELF, "minItems": 1}, "#"),
        ({"type": "array", "prefixItems": [{}, SELF], "minItems": 2}, "#"),
        ({"type": "array", "items": [SELF], "minItems": 1}, "#"),
        ({"type": "array", "items": [{}], "additionalItems": SELF, "minItems": 2}, "#"),
        ({"type": ["array", "object"], "items": SELF, "minItems": 1, "required": ["a"],
          "properties": {"a": SELF}}, "#"),
        ({"type": "object", "minProperties": 1, "additionalProperties": SELF}, "#"),
        ({"type": "object", "minProperties": 2, "additionalProperties": False,
          "properties": {"a": {}, "b": SELF}}, "#"),
        ({**CHAIN, "$defs": {"a": node(properties={"next": {"$ref": "#/$defs/b"}}),
                             "b": node(properties={"next": CHAIN})}}, "#/$defs/a"),
        ({"type": "object", "properties": {"good": {"type": "string"}, "bad": CHAIN},
          "required": ["good", "bad"],
          "$defs": {"a": node(properties={"next": CHAIN})}}, "#/$defs/a"),
        ({"oneOf": [{"$ref": "#/definitions/x~1y"}],
          "definitions": {"x/y": node(properties={"next": {"$ref": "#/definitions/x~1y"}})}},
         "#/definitions/x~1y"),
    ],
)  # fmt: skip
def test_endless(schema: dict[str, Any], reference: str) -> None:
    assert endless_reference(schema) == reference


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        node(properties={"next": {"anyOf": [SELF, {"type": "null"}]}}),
        {"type": "object", "properties": {"next": SELF}},
        node(properties={"next": SELF}) | {"type": ["object", "null"]},
        {"properties": {"next": SELF}, "required": ["next"]},
        {"type": "array", "items": SELF},
        {"type": "array", "items": SELF, "minItems": 0},
        {"type": "array", "prefixItems": [{}], "items": SELF, "minItems": 1},
        {"type": "object", "minProperties": 1, "properties": {"a": {}, "b": SELF},
         "additionalProperties": False},
        node(properties={"next": SELF}, enum=[{"next": 1}]),
        node(properties={"next": SELF}, patternProperties={"^n": {}}) | {"required": ["name"]},
        node(properties={"next": {"$ref": "#/nowhere"}}),
        node(properties={"next": {"$ref": "https://example.org/schema"}}),
        node(properties={"next": {"$ref": 5}}),
        {"$ref": "#/$defs/a", "$defs": {
            "a": node(properties={"next": {"$ref": "#/$defs/b"}}),
            "b": {"anyOf": [node(properties={"next": CHAIN}), {"$ref": "#/$defs/c"}]},
            "c": {"type": "string"}}},
    ],
)  # fmt: skip
def test_with_an_end_or_not_sure(schema: Any) -> None:
    assert endless_reference(schema) is None


def test_a_long_chain_is_followed_to_its_end() -> None:
    """Each reference is looked at again only when the one it waits for is settled."""
    size = 3000
    defs: dict[str, Any] = {
        f"n{i}": node(properties={"next": {"$ref": f"#/$defs/n{i + 1}"}}) for i in range(size)
    }
    schema = {"$ref": "#/$defs/n0", "$defs": defs | {f"n{size}": {"type": "null"}}}
    assert endless_reference(schema) is None
    schema["$defs"][f"n{size}"] = {"$ref": "#/$defs/n7"}
    assert endless_reference(schema) == "#/$defs/n0"


def test_what_nests_too_deeply_to_be_looked_at_is_not_judged() -> None:
    schema: dict[str, Any] = SELF
    for _ in range(5000):
        schema = {"allOf": [schema]}
    assert endless_reference(schema) is None
