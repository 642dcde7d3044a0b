"""The fields of a JSON object, asked for one by one; what nobody asked for is refused.

What a request says comes as an object: a body over HTTP, options from Python. `Fields` hands its
values out checked, and knows at the end which were never asked for: those are parameters that we do
not have, and are refused with the nearest that we do. So no parameter is ever dropped silently.
"""

from __future__ import annotations

import difflib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from jaxserve.errors import InvalidRequest

#: Parameters that only some endpoint has: clients send them as null to the others as well.
ELSEWHERE = frozenset(
    {
        "add_generation_prompt",
        "best_of",
        "chat_template",
        "chat_template_kwargs",
        "echo",
        "functions",
        "function_call",
        "max_completion_tokens",
        "messages",
        "parallel_tool_calls",
        "prompt",
        "reasoning_effort",
        "suffix",
        "tool_choice",
        "tools",
        "top_logprobs",
    }
)

#: Containers inside containers that a request may have.
MAX_DEPTH = 64


def show(value: Any) -> str:
    """A client's value for an error message: recognisable, and short."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int():
            return str(value) if value.bit_length() < 200 else f"a {value.bit_length()}-bit integer"
        case float():
            return repr(value)
        case str():
            return to_json(value if len(value) <= 60 else value[:60] + "…")
        case list():
            return f"a list of {len(value)}"
        case dict():
            return _show_object(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def to_json(value: Any) -> str:
    """A value as JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Any:
    """A JSON value, held to the letter as a body is.

    Raises:
        ValueError: it is none, nests too deeply, or holds what cannot be written as UTF-8.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
        to_json(value).encode()  # half of a surrogate pair may have been written as an escape
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    return value


def plain_fields(**values: Any) -> Fields:
    """Python's values as the fields of a JSON object.

    Raises:
        InvalidRequest: one is not JSON, or nests too deeply.
    """
    return Fields({name: _plain(name, value, MAX_DEPTH) for name, value in values.items()})


def _plain(name: str, value: Any, depth: int) -> Any:
    """Mappings as objects, sequences as lists."""
    if depth == 0:
        raise InvalidRequest(f"{name} nests deeper than {MAX_DEPTH} levels", param=name)
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case Mapping():
            if not all(isinstance(key, str) for key in value):
                raise InvalidRequest(f"{name} has keys that are not strings", param=name)
            return {str.__str__(k): _plain(name, v, depth - 1) for k, v in value.items()}
        case Sequence() if not isinstance(value, bytes | bytearray):
            return [_plain(name, item, depth - 1) for item in value]
        case Integral():
            return int(value)
        case Real() if math.isfinite(value):
            return float(value)
    raise InvalidRequest(
        f"{name} holds {reprlib.repr(value)}, a {type(value).__name__}, which is not JSON",
        param=name,
    )


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _show_object(value: dict[str, Any]) -> str:
    text = to_json(value) if len(value) <= 30 else ""
    return text if 0 < len(text) <= 60 else f"an object of {len(value)}"


class Fields:
    """The fields of one JSON object, each asked for by name and checked.

    A field that is absent or null gives the default.

    Args:
        values: the parsed object.
        path: of this object inside the body, for messages: "" or "messages[0].".

    Attributes:
        values: as given.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values = values
        self._path = path
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        """The value as it is; None if absent."""
        self._known.add(name)
        return self.values.get(name)

    def peek(self, name: str) -> Any:
        """The value as it is, for one who does not answer for it; None if absent."""
        return self.values.get(name)

    def wrong(self, name: str, wanted: str, value: Any) -> InvalidRequest:
        """The error for a value that is not what was wanted."""
        path = self._path + name
        return InvalidRequest(f"{path} must be {wanted}, got {show(value)}", param=path)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """A whole number within bounds, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"an integer between {low} and {high}", value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number within bounds, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if not _is_number(value) or not low <= value <= high:
            raise self.wrong(name, f"a number between {low:g} and {high:g}", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: Any = None) -> Any:
        """A string, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not str:
            raise self.wrong(name, "a string", value)
        return value

    def texts(self, name: str, limit: int, max_length: int) -> tuple[str, ...]:
        """One string or a list of non-empty strings; () if absent."""
        value = self.take(name)
        if value is None:
            return ()
        if type(value) is str:
            value = [value]
        if type(value) is not list or len(value) > limit:
            raise self.wrong(name, f"a string or a list of at most {limit} strings", value)
        for item in value:
            if type(item) is not str or not 0 < len(item) <= max_length:
                wanted = f"made of strings of 1 to {max_length} characters"
                raise self.wrong(name, wanted, item)
        return tuple(value)

    def token_ids(self, name: str, vocab_size: int, limit: int) -> tuple[int, ...] | None:
        """A list of token ids, or None."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not list or len(value) > limit:
            raise self.wrong(name, f"a list of at most {limit} token ids", value)
        self.check_tokens(name, value, vocab_size)
        return tuple(value)

    def texts_or_tokens(self, name: str, vocab_size: int, limit: int, things: str) -> list[Any]:
        """One or several texts, or lists of checked token ids; all of a kind.

        Args:
            limit: of several. things: what they are called.
        """
        value = self.take(name)
        if type(value) is str:
            return [value]
        if type(value) is not list or not value:
            raise self.wrong(name, "a string, a list of strings or token ids", value)
        if type(value[0]) is int:
            self.check_tokens(name, value, vocab_size)
            return [value]
        if len(value) > limit:
            raise self.wrong(name, f"a list of at most {limit} {things}", value)
        for item in value:
            if type(item) is not type(value[0]) or type(item) not in (str, list):
                raise self.wrong(name, "made of strings only, or of token ids only", item)
            if type(item) is list:
                self.check_tokens(name, item, vocab_size)
        return value

    def check_tokens(self, name: str, ids: Sequence[Any], vocab_size: int) -> None:
        """Refuses what is not a token id of the vocabulary."""
        for item in ids:
            if type(item) is not int or not 0 <= item < vocab_size:
                wanted = f"made of token ids between 0 and {vocab_size - 1}"
                raise self.wrong(name, wanted, item)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty if absent."""
        value = self.take(name)
        if value is None:
            return {}
        if type(value) is not dict:
            raise self.wrong(name, "an object", value)
        return value

    def nested(self, name: str) -> Fields | None:
        """The fields of an inner object; None if absent."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not dict:
            raise self.wrong(name, "an object", value)
        return Fields(value, f"{self._path}{name}.")

    def inner(self, values: dict[str, Any], name: str) -> Fields:
        """The fields of an object found inside a value of this one."""
        return Fields(values, self._path + name)

    def neutral(self, name: str, *accepted: Any, why: str = "is not supported") -> None:
        """Refuses a parameter unless it is absent or asks for what is done anyway."""
        value = self.take(name)
        if value is None or any(type(value) is type(a) and value == a for a in accepted):
            return
        path = self._path + name
        but = f"; leave it out or send {' or '.join(show(a) for a in accepted)}" if accepted else ""
        raise InvalidRequest(f"{path} {why}, got {show(value)}{but}", param=path)

    def finish(self) -> None:
        """Refuses what nobody asked for.

        Raises:
            InvalidRequest: an unknown parameter; names the nearest that exists.
        """
        for name in self.values:
            if name not in self._known and not (self.values[name] is None and name in ELSEWHERE):
                near = difflib.get_close_matches(name[:100], sorted(self._known), 1, 0.0)
                hint = f"; the nearest is {(self._path + near[0])!r}" if near else ""
                path = self._path + name[:100]
                raise InvalidRequest(f"unknown parameter {path!r}{hint}", param=path)


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
