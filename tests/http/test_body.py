"""Reading a body: a client that is too slow is told so."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from jaxserve.config import HttpConfig
from jaxserve.errors import InvalidRequest, PayloadTooLarge, RequestTimeout
from jaxserve.http.body import read_object

SCOPE = {"headers": [(b"content-type", b"application/json")]}


def read(parts: list[bytes], *, ends: bool, **config: Any) -> Any:
    """Reads a body that comes in these parts and then ends, or never does."""

    async def main() -> Any:
        waiting = list(parts)

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting) or not ends}

        return await read_object(SCOPE, receive, HttpConfig(**config))

    return asyncio.run(main())


def test_a_body_in_parts() -> None:
    text = json.dumps({"model": "m"}).encode()
    assert read([text[:3], text[3:]], ends=True).text("model") == "m"


def test_a_body_that_never_ends() -> None:
    with pytest.raises(RequestTimeout, match=r"within 0\.1 s: .*http\.body_timeout_s") as refused:
        read([b'{"model": '], ends=False, body_timeout_s=0.1)
    assert (refused.value.status, refused.value.code) == (408, "request_timeout")


def test_other_refusals_come_first() -> None:
    with pytest.raises(PayloadTooLarge):
        read([b"x" * 2000], ends=False, max_body_bytes=1024)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        read([b"{"], ends=True)
