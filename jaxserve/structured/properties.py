"""How many properties a schema has: the library takes the square of their number to compile them.

Without the library, so that large schemas can be refused before anybody compiles anything.
"""

from __future__ import annotations

import json

from jaxserve.errors import GrammarError
from jaxserve.types import Grammar


def refuse_large(grammar: Grammar, max_properties: int) -> None:
    """Refuses a schema of more properties; grammars of other kinds are not looked at.

    Raises:
        GrammarError: it has more.
    """
    if grammar.kind != "json_schema" or not may_have_more(grammar.text, max_properties):
        return
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError):
        return  # whoever compiles it says what is wrong
    check_properties(schema, max_properties)


def may_have_more(text: str, max_properties: int) -> bool:
    """Whether a schema is worth counting: each property has a colon."""
    return text.count(":") > max_properties


def check_properties(schema: object, max_properties: int) -> None:
    """Refuses a schema of more properties, all that stand in `properties` at any depth.

    Raises:
        GrammarError: it has more.
    """
    num, nodes = 0, [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            properties = node.get("properties")
            num += len(properties) if isinstance(properties, dict) else 0
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    if num > max_properties:
        raise GrammarError(
            f"the schema has {num} properties, the limit is {max_properties}; send fewer, or raise "
            "structured.max_properties"
        )
