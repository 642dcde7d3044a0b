"""Request bodies: read under a limit, parsed, and taken apart field by field.

`read_object` turns the ASGI messages into one JSON object; `Fields` hands its values out checked,
and knows at the end which were never asked for: those are parameters that we do not have, and are
refused with the nearest that we do. So no parameter is ever dropped silently.

Invariants: a body is never buffered past the limit; whatever the bytes are, the outcome is a
checked value or an `InvalidRequest` that names field, value and limit.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from jaxserve.errors import (
    InvalidRequest,
    PayloadTooLarge,
    UnsupportedMediaType,
)

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
#: Containers inside containers that a body may have.
MAX_DEPTH = 64


async def read_object(scope: Any, receive: Any, max_bytes: int) -> Fields:
    """The body as the fields of one JSON object.

    Args:
        max_bytes: `http.max_body_bytes`.

    Raises:
        UnsupportedMediaType: it is not declared as JSON, or is compressed.
        PayloadTooLarge: it is, or says it is, larger than `max_bytes`.
        InvalidRequest: it is not one JSON object of sane depth, or the client left midway.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        said = kind.decode("latin-1")[:80] or "nothing"
        raise UnsupportedMediaType(f"content-type must be application/json, got {said}")
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding != b"identity":
        said = coding.decode("latin-1")[:80]
        raise UnsupportedMediaType(f"content-encoding {said} is not supported: send it plain")
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > max_bytes:
        raise _too_large(int(announced[:20]), max_bytes)
    return Fields(parse_object(await _read_body(receive, max_bytes)))


async def _read_body(receive: Any, max_bytes: int) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the client left before its request was complete")
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(len(body), max_bytes)
        more = message.get("more_body", False)
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Bytes as one JSON object.

    Raises:
        InvalidRequest: they are not valid UTF-8, JSON, an object, or nest too deeply.
    """
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise _not_json(body, error) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {show(value)}")
    _check_depth(value)
    return value


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            items = container.values() if type(container) is dict else container
            inner += [item for item in items if type(item) is dict or type(item) is list]
        if not inner:
            return
        level = inner
    raise _too_deep()


def _not_json(body: bytes, error: Exception) -> InvalidRequest:
    """Why a body was not taken; by field, where a laxer reader gets through it."""
    try:
        path = _unspeakable(json.loads(body), "")
    except (ValueError, RecursionError):
        path = None
    if path is None:
        return InvalidRequest(f"the body is not valid JSON: {error}")
    what = "holds half of a surrogate pair, or a number that is not finite"
    return InvalidRequest(f"the body is not valid JSON: {path or 'it'} {what}", param=path or None)


def _unspeakable(value: Any, path: str) -> str | None:
    """Where a value holds a lone surrogate or an infinite number; None where nowhere."""
    match value:
        case str():
            return path if any("\ud800" <= c <= "\udfff" for c in value) else None
        case float():
            return None if math.isfinite(value) else path
        case list():
            pairs = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        case dict():
            pairs = [(f"{path}.{name}" if path else name, item) for name, item in value.items()]
        case _:
            return None
    found = (_unspeakable(item, inner) for inner, item in pairs)
    return next((inner for inner in found if inner is not None), None)


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body nests deeper than the limit of {MAX_DEPTH} levels")


def _too_large(num_bytes: int, max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body has {num_bytes} bytes or more, the limit is {max_bytes}; send less, or raise "
        "http.max_body_bytes"
    )


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
            return msgspec.json.encode(value if len(value) <= 60 else value[:60] + "…").decode()
        case list():
            return f"a list of {len(value)}"
        case dict():
            text = msgspec.json.encode(value)
            return text.decode() if len(text) <= 60 else f"an object of {len(value)}"
    raise TypeError(f"{type(value).__name__} is not a JSON value")


class Fields:
    """The fields of one JSON object, each asked for by name and checked.

    A field that is absent or null gives the default.

    Args:
        values: the parsed object.
        path: of this object inside the body, for messages: "" or "messages[0].".
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        """The value as it is; None if absent."""
        self._known.add(name)
        return self._values.get(name)

    def peek(self, name: str) -> Any:
        """The value as it is, for one who does not answer for it; None if absent."""
        return self._values.get(name)

    def fingerprint(self) -> bytes:
        """Equal for equal objects whose fields stand in the same order."""
        return hashlib.blake2b(msgspec.json.encode(self._values), digest_size=16).digest()

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
        for name in self._values:
            if name not in self._known and not (self._values[name] is None and name in ELSEWHERE):
                near = difflib.get_close_matches(name[:100], sorted(self._known), 1, 0.0)
                hint = f"; the nearest is {(self._path + near[0])!r}" if near else ""
                path = self._path + name[:100]
                raise InvalidRequest(f"unknown parameter {path!r}{hint}", param=path)


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
