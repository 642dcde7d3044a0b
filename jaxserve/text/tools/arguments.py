"""A tool's arguments as rules of a grammar: as a JSON object, or as Python's keyword arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from jaxserve.errors import GrammarError
from jaxserve.structured.grammars import json_schema
from jaxserve.text.tools.tool import Tool

_SEPARATORS = {"item_separator": ", ", "key_separator": ": "}
#: What a schema may say beside its properties, and still be keyword arguments.
_KEYWORDS = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "$defs", "definitions"),
        *("title", "description", "default", "examples", "$schema", "$id", "$comment"),
    }
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
#: Any keyword arguments, for tools that do not say which they take.
_ANY_NAME = r"/[a-z_][a-z0-9_]{0,31}/"


def json_rule(schema: Mapping[str, object] | bool) -> str:
    """A schema's values, with white space as templates write it: with more it may never end."""
    document = json.loads(json_schema(schema, whitespace=False).text)
    document["x-guidance"] |= _SEPARATORS
    return "%json " + json.dumps(document, ensure_ascii=False)


def keyword_rules(name: str, tool: Tool) -> list[str]:
    """A tool's properties as keyword arguments, in their order.

    `name_K_0` is what may follow from property K on where nothing stands before it; `name_K_1`
    where something does.

    Raises:
        GrammarError: the schema says what keyword arguments cannot be held to.
    """
    schema = tool.schema
    if "properties" not in schema and schema.get("additionalProperties") is not False:
        _check(tool, {}, [])
        one = f'{name}_name "=" {name}_value'
        return [
            f'{name}: ({one} (", " {one})*)?',
            f"{name}_name: {_ANY_NAME}",
            f"{name}_value: {json_rule({'anyOf': [{}]})}",
        ]
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    _check(tool, properties, required)
    assert isinstance(properties, Mapping) and isinstance(required, list)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules = [f"{name}: {name}_0_0"]
    for place, (key, value) in enumerate(properties.items()):
        whole = value if isinstance(value, bool) else {**shared, **value}
        rules.append(f"{name}_value_{place}: {json_rule(whole)}")
        for written, comma in enumerate(("", ", ")):
            given = f"{quoted(f'{comma}{key}=')} {name}_value_{place} {name}_{place + 1}_1"
            left_out = "" if key in required else f" | {name}_{place + 1}_{written}"
            rules.append(f"{name}_{place}_{written}: {given}{left_out}")
    last = len(properties)
    return [*rules, f'{name}_{last}_0: ""', f'{name}_{last}_1: ""']


def quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def _check(tool: Tool, properties: object, required: object) -> None:
    """Refuses what these rules would not hold to."""
    fault = next((f"{key!r}" for key in tool.schema if key not in _KEYWORDS), "")
    if not isinstance(properties, Mapping):
        fault = "'properties' that are no object"
    elif not isinstance(required, list) or not all(
        isinstance(key, str) and key in properties for key in required
    ):
        fault = "'required' that is no list of properties"
    else:
        for key, value in properties.items():
            if not _NAME.fullmatch(key):
                fault = f"a property called {key[:64]!r}"
            elif not isinstance(value, Mapping | bool):
                fault = f"property {key!r} that is no schema"
    if fault:
        raise GrammarError(
            f"{tool.param}: calls written as Python cannot be held to {fault}; leave it out, or "
            "choose another tools.parser",
            param=tool.param,
        )
