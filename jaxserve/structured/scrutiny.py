"""What compiles and is refused all the same: it would not do what it says.

- A schema that nothing finite matches (`endless`), by itself or as `%json` in a grammar.
- A schema of more properties than may be: the library takes the square of their number.
- Attributes of a grammar's rules that have no effect here: `start[temperature=0.5]: …`.

Takes time that grows with the grammar, so the front end does it where it compiles (in a process
that can be killed); what passes there is not looked at again in the engine.
"""

from __future__ import annotations

import json
import re

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError
from jaxserve.structured.endless import endless_reference
from jaxserve.structured.matcher import lark_of
from jaxserve.structured.properties import check_properties, may_have_more
from jaxserve.types import Grammar

#: Attributes of rules that the library takes and that change nothing here, and why.
_WITHOUT_EFFECT = {
    "temperature": "send temperature beside the grammar, for the whole output",
    "capture": "nothing is captured",
    "stop_capture": "nothing is captured",
}
#: What a grammar in Lark's syntax is made of, as far as it matters where something stands. What is
#: not closed counts as well: so nothing is looked at twice.
_LEXEMES = re.compile(
    r"""
    (?P<comment> (?:\#|//)[^\n]*)
  | (?P<string> "(?:\\.|[^"\\\n])*(?:"i?)?)
  | (?P<regex> /(?:\\.|[^/\\])+(?:/[imslux]*)?)
  | (?P<token> <[^<>\s]*>?)
  | (?P<json> %(?:json|llguidance|regex)\b)
  | (?P<name> !?[_?]?[a-zA-Z][\w-]*)
  | (?P<sign> [\[\]:=,])
    """,
    re.VERBOSE,
)
_DECODER = json.JSONDecoder()


def scrutinise(grammar: Grammar, max_properties: int = StructuredConfig.max_properties) -> None:
    """Returns where a grammar does what it says; it may still be wrong.

    Args:
        max_properties: of one schema (`structured.max_properties`).

    Raises:
        GrammarError: it does not.
    """
    match grammar.kind:
        case "json_schema":
            _check_text(grammar.text, max_properties)
        case "lark" | "ebnf":
            _check_lark(lark_of(grammar), max_properties)


def _check_text(text: str, max_properties: int) -> None:
    if '"$ref"' not in text and not may_have_more(text, max_properties):
        return
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return  # the library says what is wrong
    _check_schema(text, schema, max_properties)


def _check_schema(text: str, schema: object, max_properties: int) -> None:
    """Refuses a large one, and an endless one."""
    check_properties(schema, max_properties)
    if '"$ref"' in text:
        _check_ends(text, schema)


def _check_ends(text: str, schema: object) -> None:
    """Refuses an endless one; one whose references do not all start at its root is not judged."""
    own = isinstance(schema, dict) and "$id" in schema
    if text.count('"$id"') > own:
        return
    reference = endless_reference(schema)
    if reference is not None:
        raise GrammarError(
            f'"$ref": {json.dumps(reference)[:200]} never ends: every value that matches needs '
            "another one inside it; leave it out of required, or let it be null"
        )


def _check_lark(text: str, max_properties: int) -> None:
    place = 0
    heads: list[str] = []  # the names and signs since a rule may have begun
    while (found := _LEXEMES.search(text, place)) is not None:
        place = found.end()
        match found.lastgroup:
            case "json":
                most = max_properties if found.group() == "%json" else None
                place = _check_embedded(text, place, most)
            case "sign" if found.group() == ":":
                _check_head(heads)
                heads = []
            case "name" | "sign":
                heads.append(found.group())
            case "string" | "regex":
                heads.append("")


def _check_embedded(text: str, place: int, max_properties: int | None) -> int:
    """The end of the JSON that follows, which is a schema where it has a limit."""
    start = place + len(text[place : place + 1000]) - len(text[place : place + 1000].lstrip())
    try:
        schema, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return len(text)  # the library says what is wrong
    if max_properties is not None:
        _check_schema(text[start:end], schema, max_properties)
    return end


def _check_head(heads: list[str]) -> None:
    """Refuses attributes, `name[one, other=…]` before a colon, that have no effect."""
    if not heads or heads[-1] != "]":
        return
    start = len(heads) - 1
    while start and heads[start] != "[":
        start -= 1
    for before, name in zip(heads[start:], heads[start + 1 :], strict=False):
        if before in ("[", ",") and name in _WITHOUT_EFFECT:
            rule = heads[start - 1][:80] if start else ""
            raise GrammarError(
                f"the attribute {name!r} of rule {rule!r} has no effect here: "
                f"{_WITHOUT_EFFECT[name]}"
            )
