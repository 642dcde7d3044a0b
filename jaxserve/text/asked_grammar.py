"""What a request says its output must match: OpenAI's `response_format`, and vLLM's parameters.

One of them at most. Schemas are always held to strictly, whatever `strict` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxserve.errors import InvalidRequest
from jaxserve.structured import grammars
from jaxserve.structured.grammars import Tag
from jaxserve.text.fields import Fields, from_json
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Grammar

MAX_CHOICES = 1000
MAX_TAGS = 500

#: vLLM's older names, and what each is called inside `structured_outputs`.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


class Wanted(NamedTuple):
    """A grammar, and the parameter that it comes from."""

    grammar: Grammar
    param: str


def read_grammar(fields: Fields, tokenizer: Tokenizer) -> Wanted | None:
    """The grammar that a request asks for; None where its output is free.

    Raises:
        InvalidRequest: a parameter is wrong, or there are several.
    """
    found = [
        wanted
        for wanted in (
            _response_format(fields, tokenizer),
            _structured_outputs(fields, tokenizer),
            *(_guided(fields, name, tokenizer) for name in _GUIDED),
        )
        if wanted is not None
    ]
    if len(found) > 1:
        names = " and ".join(wanted.param for wanted in found)
        raise InvalidRequest(f"{names} exclude each other; send one of them", param=found[1].param)
    return found[0] if found else None


def _response_format(fields: Fields, tokenizer: Tokenizer) -> Wanted | None:
    inner = fields.nested("response_format")
    if inner is None:
        return None
    kind = inner.text("type")
    grammar = None
    match kind:
        case "text":
            pass
        case "json_object":
            grammar = grammars.json_object()
        case "json_schema":
            grammar = _named_schema(inner)
        case "structural_tag":
            grammar = _structural_tag(inner, tokenizer)
        case _:
            raise inner.wrong("type", "text, json_object, json_schema or structural_tag", kind)
    inner.finish()
    return None if grammar is None else Wanted(grammar, "response_format")


def _named_schema(fields: Fields) -> Grammar:
    inner = fields.nested("json_schema")
    if inner is None:
        raise fields.wrong("json_schema", "an object", None)
    if inner.text("name") is None:
        raise inner.wrong("name", "a string", None)
    inner.text("description")
    inner.flag("strict", True)
    grammar = _schema(inner, "schema")
    inner.finish()
    return grammar


def _structured_outputs(fields: Fields, tokenizer: Tokenizer) -> Wanted | None:
    inner = fields.nested("structured_outputs")
    if inner is None:
        return None
    whitespace = not inner.flag("disable_any_whitespace", False)
    pattern = inner.text("whitespace_pattern", "")
    inner.flag("disable_fallback", False)
    inner.neutral("disable_additional_properties", False)
    found = {
        name: grammar
        for name in ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        if (grammar := _constraint(inner, name, tokenizer, whitespace, pattern)) is not None
    }
    inner.finish()
    if len(found) != 1:
        said = ", ".join(found) or "none"
        raise InvalidRequest(
            "structured_outputs takes one of json, regex, choice, grammar, json_object and "
            f"structural_tag, got {said}",
            param="structured_outputs",
        )
    ((name, grammar),) = found.items()
    return Wanted(grammar, f"structured_outputs.{name}")


def _guided(fields: Fields, name: str, tokenizer: Tokenizer) -> Wanted | None:
    value = fields.take(name)
    if value is None:
        return None
    inner = Fields({_GUIDED[name]: value})
    try:
        grammar = _constraint(inner, _GUIDED[name], tokenizer, True, "")
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error.message}", param=name) from None
    return None if grammar is None else Wanted(grammar, name)


def _constraint(
    fields: Fields, name: str, tokenizer: Tokenizer, whitespace: bool, pattern: str
) -> Grammar | None:
    """One of `structured_outputs`' kinds; None where it is not asked for."""
    if fields.peek(name) is None:
        fields.take(name)
        return None
    match name:
        case "json":
            return _schema(fields, name, whitespace=whitespace, whitespace_pattern=pattern)
        case "regex":
            return grammars.regex(_text(fields, name))
        case "choice":
            choices = fields.texts(name, MAX_CHOICES, 2**20)
            if not choices:
                raise fields.wrong(name, "a list of at least one string", list(choices))
            return grammars.choice(choices)
        case "grammar":
            return grammars.context_free(_text(fields, name))
        case "json_object":
            return grammars.json_object() if fields.flag(name, False) else None
    value = fields.take(name)
    if isinstance(value, str):
        value = _parsed(fields, name, value)
    if not isinstance(value, dict):
        raise fields.wrong(name, "an object", value)
    inner = fields.inner(value, f"{name}.")
    inner.neutral("type", "structural_tag")
    grammar = _structural_tag(inner, tokenizer)
    inner.finish()
    return grammar


def _schema(fields: Fields, name: str, **options: Any) -> Grammar:
    value = fields.take(name)
    if isinstance(value, str):
        value = _parsed(fields, name, value)
    if not isinstance(value, dict | bool):
        raise fields.wrong(name, "a JSON schema", value)
    return grammars.json_schema(value, **options)


def _parsed(fields: Fields, name: str, text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        raise fields.wrong(name, "JSON, as an object or as text", text) from None


def _text(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if not text:
        raise fields.wrong(name, "a string that is not empty", text)
    return text


def _structural_tag(fields: Fields, tokenizer: Tokenizer) -> Grammar:
    """vLLM's first form: structures that begin with one of some triggers, among free text."""
    fields.neutral("format")
    values, triggers = fields.take("structures"), fields.take("triggers")
    if type(values) is not list or not 0 < len(values) <= MAX_TAGS:
        raise fields.wrong("structures", f"a list of 1 to {MAX_TAGS} objects", values)
    if type(triggers) is not list or not all(type(t) is str and t for t in triggers):
        raise fields.wrong("triggers", "a list of strings that are not empty", triggers)
    tags = []
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise fields.wrong(f"structures[{index}]", "an object", value)
        inner = fields.inner(dict(value), f"structures[{index}].")
        begin, end = inner.text("begin", ""), inner.text("end", "")
        found = [trigger for trigger in triggers if begin.startswith(trigger)]
        if not found:
            raise inner.wrong("begin", "a text that starts with one of triggers", begin)
        schema = inner.take("schema")
        if not isinstance(schema, dict | bool):
            raise inner.wrong("schema", "a JSON schema", schema)
        inner.finish()
        tags.append(Tag(begin=begin, schema=schema, end=end, trigger=max(found, key=len)))
    return grammars.tagged(tags, special_tokens=special_tokens(tokenizer, tags))


def special_tokens(tokenizer: Tokenizer, tags: list[Tag]) -> dict[str, int]:
    """The special tokens that stand in tags, by how they are written."""
    text = "".join(tag.begin + tag.end for tag in tags)
    ids = tokenizer.encode(text, add_special_tokens=False)
    special = filter(tokenizer.is_special, ids)
    return {tokenizer.token_bytes(token).decode("utf-8", "replace"): token for token in special}
