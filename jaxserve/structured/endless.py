"""Schemas that no finite JSON matches: each value needs another of its kind inside it.

    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}

An output would be held to such a schema until its tokens end. Which schemas may end is the least
fixpoint over the references: one may, if it does without those of which that is not known yet. What
is not understood here may end: only what is certain is found.
"""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import unquote


def endless_reference(schema: Any) -> str | None:
    """The first reference on the way from the root that leads to no end; None where there is one.

    Args:
        schema: a whole document; references are looked up in it.
    """
    if not isinstance(schema, dict):
        return None
    search = _Search(schema)
    try:
        return search.run()
    except RecursionError:
        return None


class _Search:
    """The fixpoint.

    References are looked at from the root on, and again when one that they wait for may end.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._ending: set[str] = set()
        self._asked: dict[str, None] = {}  # by the schema that is being looked at, in order

    def run(self) -> str | None:
        waiting: dict[str, set[str]] = {}
        asked_of_root: dict[str, None] = {}
        found, queue = {"#"}, ["#"]
        while queue:
            pointer = queue.pop()
            if pointer in self._ending:
                continue
            self._asked = {}
            if self._may_end(self._at(pointer)):
                self._ending.add(pointer)
                queue += waiting.pop(pointer, ())
                continue
            if pointer == "#":
                asked_of_root = self._asked
            for reference in self._asked:
                waiting.setdefault(reference, set()).add(pointer)
                if reference not in found:
                    found.add(reference)
                    queue.append(reference)
        if "#" in self._ending:
            return None
        return next((r for r in asked_of_root if r not in self._ending), None)

    def _may_end(self, schema: Any) -> bool:
        if not isinstance(schema, dict):
            return True
        if "$ref" in schema and not self._reference_may_end(schema["$ref"]):
            return False
        if "enum" in schema or "const" in schema:
            return True
        if not all(map(self._may_end, _listed(schema.get("allOf")))):
            return False
        for name in ("anyOf", "oneOf"):
            options = _listed(schema.get(name))
            if options and not any(map(self._may_end, options)):
                return False
        kinds = schema.get("type")
        kinds = _listed(kinds if isinstance(kinds, list) else [kinds])
        return not kinds or any(self._kind_may_end(kind, schema) for kind in kinds)

    def _kind_may_end(self, kind: Any, schema: dict[str, Any]) -> bool:
        """Whether a value of this type may: only those that hold others may not."""
        if kind == "object":
            return self._object_may_end(schema)
        return kind != "array" or self._array_may_end(schema)

    def _object_may_end(self, schema: dict[str, Any]) -> bool:
        properties, others = schema.get("properties"), schema.get("additionalProperties", True)
        properties = properties if isinstance(properties, dict) else {}
        patterns = schema.get("patternProperties") or False  # a name may match one
        for name in _listed(schema.get("required")):
            known = properties.get(name, True if patterns else others)
            if not self._may_end(known):
                return False
        least = schema.get("minProperties")
        if not isinstance(least, int) or least <= 0 or patterns:
            return True
        rest = math.inf if others is not False and self._may_end(others) else 0
        return rest + sum(map(self._may_end, properties.values())) >= least

    def _array_may_end(self, schema: dict[str, Any]) -> bool:
        least, items = schema.get("minItems"), schema.get("items", True)
        first = _listed(schema.get("prefixItems"))
        if isinstance(items, list):  # as drafts before 2020-12 have them
            first, items = items, schema.get("additionalItems", True)
        if not isinstance(least, int) or least <= 0:
            return True
        rest = least <= len(first) or self._may_end(items)
        return rest and all(map(self._may_end, first[:least]))

    def _reference_may_end(self, reference: Any) -> bool:
        if not isinstance(reference, str) or self._at(reference) is _UNKNOWN:
            return True
        if reference in self._ending:
            return True
        self._asked[reference] = None
        return False

    def _at(self, pointer: str) -> Any:
        """What a JSON pointer of this document points to."""
        if pointer == "#":
            return self._root
        if not pointer.startswith("#/"):
            return _UNKNOWN
        node: Any = self._root
        for part in unquote(pointer[2:]).split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdigit() and int(key[:9]) < len(node):
                node = node[int(key[:9])]
            else:
                return _UNKNOWN
        return node


#: Of a reference that leads out of the document, or nowhere.
_UNKNOWN = object()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
