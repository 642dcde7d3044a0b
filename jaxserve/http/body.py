"""Request bodies: read under a limit, and parsed; `text.fields` takes them apart.

Invariants: a body is never buffered past the limit; whatever the bytes are, the outcome is a
checked value or an `InvalidRequest` that names field, value and limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from typing import Any

import msgspec

from jaxserve.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from jaxserve.text.fields import MAX_DEPTH, Fields, show

#: Smaller bodies take well under a millisecond to parse.
_INLINE_BYTES = 1 << 16
#: Of a body that is too large, before its connection is closed all the same.
_MAX_DISCARDED_BYTES = 1 << 28


async def read_object(scope: Any, receive: Any, max_bytes: int, one_large: asyncio.Lock) -> Fields:
    """The body as the fields of one JSON object.

    Args:
        max_bytes: `http.max_body_bytes`.
        one_large: held while a large one is parsed, in a thread: however many come at once, streams
            go on between them.

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
    try:
        if announced.isdigit() and int(announced[:20]) > max_bytes:
            raise _too_large(int(announced[:20]), max_bytes)
        body = await _read_body(receive, max_bytes)
    except PayloadTooLarge:
        if _closes(scope, headers):
            await _discard(receive)
        raise
    if len(body) <= _INLINE_BYTES:
        return Fields(parse_object(body))
    async with one_large:
        return Fields(await asyncio.to_thread(parse_object, body))


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


def _closes(scope: Any, headers: dict[bytes, bytes]) -> bool:
    """Whether the connection ends with this request; else the server reads on by itself."""
    options = headers.get(b"connection", b"").lower().split(b",")
    return scope.get("http_version") == "1.0" or b"close" in map(bytes.strip, options)


async def _discard(receive: Any) -> None:
    """Reads on: who still sends when the connection is closed is reset, and reads no answer."""
    num_bytes, more = 0, True
    while more and num_bytes < _MAX_DISCARDED_BYTES:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)


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
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return
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


def fingerprint(fields: Fields) -> bytes:
    """Equal for equal bodies whose fields stand in the same order."""
    return hashlib.blake2b(msgspec.json.encode(fields.values), digest_size=16).digest()


def num_bytes(fields: Fields, name: str) -> int:
    """Of a field as JSON; 0 if it is absent."""
    value = fields.peek(name)
    return 0 if value is None else len(msgspec.json.encode(value))
