"""What a request says its output must match, as one `Grammar`: text, ready to cross to the engine.

The front end calls these; nothing here compiles a grammar or imports the library that does, so it
costs nothing on the event loop. Whether a grammar is right is found by `checker` in the front end,
in a process that can be killed, and again by `compiler` in the engine.

Structural tags: free text, in which each `Tag` that the model begins must be carried through: its
`begin`, a value that matches its schema, its `end`. Special tokens of the model (a `<tool_call>`
that is one token) are matched as those tokens where their ids are given, and as text where not.

    tag = Tag(begin='<tool_call>\\n{"name": "add", "arguments": ', schema=…, end="}\\n</tool_call>")
    grammar = tagged([tag], special_tokens={"<tool_call>": 151657, "</tool_call>": 151658})
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError, InvalidRequest
from jaxserve.structured.formats import with_real_dates
from jaxserve.types import Grammar

#: A rule of llama.cpp's and vLLM's EBNF: `root ::= …`.
_EBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
#: A slash in a regular expression, or what is escaped.
_SLASH = re.compile(r"\\.|/", re.DOTALL)


#: What may stand between JSON's tokens: blanks, or a line's end and the next one's indentation.
#: Without a bound a model can go on with white space until its tokens end.
WHITESPACE = r"[ \t]{1,8}|\r?\n[ \t]{0,64}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A stretch of output with a form of its own.

    Attributes:
        begin: how it begins, exactly. What makes the model bound to go on is `trigger`.
        schema: JSON schema of the value that follows; None for any text without `end`.
        end: what closes it.
        trigger: a part of `begin` from its start: once the output holds it, some tag with this
            trigger has to follow. All of `begin` where empty.
    """

    begin: str
    schema: Mapping[str, Any] | bool | None
    end: str
    trigger: str = ""


def json_object() -> Grammar:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(
    schema: Mapping[str, Any] | bool, *, whitespace: bool = True, whitespace_pattern: str = ""
) -> Grammar:
    """JSON that the schema admits, all of its keywords held to, and dates that there are.

    Args:
        whitespace: whether any (WHITESPACE) may stand between JSON's tokens.
        whitespace_pattern: a regular expression of what may, instead.
    """
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
    if whitespace or whitespace_pattern:
        options["whitespace_pattern"] = whitespace_pattern or WHITESPACE
    else:
        options["whitespace_flexible"] = False
    if not isinstance(schema, Mapping):
        schema = {"anyOf": [{}]} if schema else {"anyOf": [False]}
    # The library reads its options from here: a client's own would switch keywords off.
    text = _dump({**schema, "x-guidance": options})
    if '"format":"date' in text or '"format":"time"' in text:  # most have none: it takes a walk
        text = _dump({**with_real_dates(schema), "x-guidance": options})
    return Grammar(kind="json_schema", text=text)


def regex(pattern: str) -> Grammar:
    """Text that the whole regular expression matches (the `regex` crate's syntax)."""
    return Grammar(kind="regex", text=pattern)


def choice(choices: Sequence[str]) -> Grammar:
    """One of several texts."""
    return Grammar(kind="lark", text="start: " + " | ".join(map(_literal, choices)))


def context_free(text: str) -> Grammar:
    """A grammar in Lark's syntax, or in EBNF as llama.cpp and vLLM write it (`root ::= …`)."""
    return Grammar(kind="ebnf" if _EBNF_RULE.search(text) else "lark", text=text)


def in_lark(grammar: Grammar) -> str:
    """A grammar as a part of a rule in Lark's syntax.

    Raises:
        GrammarError: it is in EBNF, which takes time to translate.
    """
    match grammar.kind:
        case "json_schema":
            return f"%json {grammar.text}"
        case "regex":
            inner = _SLASH.sub(lambda found: r"\/" if found[0] == "/" else found[0], grammar.text)
            return f"/{inner or '()'}/"  # two slashes would begin a comment
        case "lark":
            return f"%lark {{\n{grammar.text}\n}}"
    raise GrammarError(
        "a grammar in EBNF does not go with a prompt that has begun the model's reasoning; write "
        "it in Lark's syntax"
    )


def from_words(words: Mapping[str, Any]) -> Grammar:
    """The grammar that one of vLLM's words asks for, as in its `structured_outputs`.

    Raises:
        InvalidRequest: there is not exactly one, or it is of a wrong type.
    """
    makers: dict[str, tuple[Any, Any]] = {
        "json": (Mapping | bool, json_schema),
        "regex": (str, regex),
        "choice": (Sequence, choice),
        "grammar": (str, context_free),
        "json_object": (bool, lambda _: json_object()),
    }
    if len(words) != 1 or not words.keys() <= makers.keys():
        raise InvalidRequest(
            f"grammar takes one of {', '.join(makers)}, got {', '.join(map(str, words)) or 'none'}",
            param="grammar",
        )
    ((name, value),) = words.items()
    kind, make = makers[name]
    right = isinstance(value, kind)
    if name == "choice" and right:
        right = not isinstance(value, str) and bool(value)
        right = right and all(isinstance(text, str) for text in value)
    if not right:
        raise InvalidRequest(f"grammar.{name} has a wrong type", param="grammar")
    return make(value)


def check_size(grammar: Grammar, config: StructuredConfig) -> None:
    """Refuses what is not even looked at.

    Raises:
        GrammarError: it is too large.
    """
    num_bytes = len(grammar.text.encode("utf-8", "surrogatepass"))
    if num_bytes > config.max_grammar_bytes:
        raise GrammarError(
            f"the grammar has {num_bytes} bytes, the limit is {config.max_grammar_bytes}; send "
            "less, or raise structured.max_grammar_bytes"
        )


def tagged(
    tags: Sequence[Tag],
    *,
    special_tokens: Mapping[str, int] | None = None,
    text: bool = True,
    required: bool = False,
    several: bool = True,
) -> Grammar:
    """Text and tags.

    Args:
        tags: at least one.
        special_tokens: the model's special tokens by how they are written. Where one stands in a
            tag's begin or end, the token is meant, which text never holds.
        text: whether text may stand before, between and after tags. Without it the output is tags
            only.
        required: whether there must be a tag.
        several: whether there may be more than one.
    """
    rules, options = [], []
    for index, tag in enumerate(tags):
        options.append(f"tag_{index}")
        rules += _tag_rules(f"tag_{index}", tag, special_tokens or {}, text)
    one = f"({' | '.join(options)})"
    count = {
        (False, False): f"{one}?",
        (False, True): f"{one}*",
        (True, False): one,
        (True, True): f"{one}+",
    }[required, several]
    start = f"start: {count} TEXT" if text else f"start: {count}"
    return Grammar(kind="lark", text="\n".join([start, r"TEXT: /(.|\n)*/", *rules, ""]))


def _tag_rules(name: str, tag: Tag, special_tokens: Mapping[str, int], text: bool) -> list[str]:
    before = "TEXT " if text else ""
    trigger = tag.trigger or tag.begin
    if not trigger or not tag.begin.startswith(trigger):
        raise ValueError(f"a tag's begin {tag.begin!r} does not start with its trigger {trigger!r}")
    rest = _spell(tag.begin[len(trigger) :], special_tokens)
    pieces = _pieces(trigger, special_tokens)
    rules = []
    if text and isinstance(pieces[0], str):
        # Text ends where the trigger is complete, and nowhere else: a lazy lexeme.
        rules.append(f"{name}_begin[lazy]: TEXT {_literal(pieces[0])}")
        head = f"{name}_begin {_spell_pieces(pieces[1:])}"
    else:
        head = before + _spell_pieces(pieces)
    if tag.schema is not None:
        body = f"%json {json_schema(tag.schema).text} {_spell(tag.end, special_tokens)}"
    else:
        ends = _pieces(tag.end, special_tokens)
        if ends and isinstance(ends[0], str):
            rules.append(f"{name}_end[lazy]: TEXT {_literal(ends[0])}")
            body = f"{name}_end {_spell_pieces(ends[1:])}"
        else:
            body = f"TEXT {_spell_pieces(ends)}"
    return [*rules, f"{name}: {head} {rest} {body}"]


def _pieces(text: str, special_tokens: Mapping[str, int]) -> list[str | int]:
    """Text, with special tokens as their ids."""
    names = [name for name in special_tokens if name and name in text]
    if not names:
        return [text] if text else []
    names.sort(key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [special_tokens.get(part, part) for part in parts if part]


def _spell(text: str, special_tokens: Mapping[str, int]) -> str:
    return _spell_pieces(_pieces(text, special_tokens))


def _spell_pieces(pieces: Sequence[str | int]) -> str:
    return " ".join(f"<[{p}]>" if isinstance(p, int) else _literal(p) for p in pieces)


def _literal(text: str) -> str:
    """A text as Lark writes it, which JSON does but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
