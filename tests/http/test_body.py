"""Reading a body: what comes too slowly, too late, or cannot be read is told so."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from jaxserve.config import HttpConfig
from jaxserve.errors import (
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)
from jaxserve.http.body import read_object
from tests.http.frontend import front as make_front

SCOPE = {"headers": [(b"content-type", b"application/json")]}


def read(parts: list[bytes], *, ends: bool = True, headers: tuple = (), limit: int = 4096) -> Any:
    """Reads a body that comes in these parts and then ends, or never does."""

    async def main() -> Any:
        waiting = list(parts)

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting) or not ends}

        scope = {"headers": [*SCOPE["headers"], *headers]}
        return await read_object(scope, receive, limit, asyncio.Lock())

    return asyncio.run(main())


def test_a_body_in_parts() -> None:
    text = json.dumps({"model": "m"}).encode()
    assert read([text[:3], text[3:]], ends=True).text("model") == "m"


async def never() -> Any:
    """A body that does not come."""
    await asyncio.Event().wait()


def test_a_body_that_never_ends() -> None:
    with (
        make_front(HttpConfig(body_timeout_s=0.1)) as front,
        pytest.raises(RequestTimeout, match=r"within 0\.1 s: .*http\.body_timeout_s") as refused,
    ):
        front.run(front.app.frontend.read(SCOPE, never))
    assert (refused.value.status, refused.value.code) == (408, "request_timeout")


def test_a_body_that_is_not_there_when_the_server_drains_is_refused_at_once() -> None:
    with make_front() as front:
        frontend = front.app.frontend

        async def main() -> None:
            reading = asyncio.create_task(frontend.read(SCOPE, never))
            while not frontend._reading:
                await asyncio.sleep(0)
            frontend.drain()
            await reading

        with pytest.raises(Overloaded, match="shutting down"):
            front.run(main())


def test_other_refusals_come_first() -> None:
    with pytest.raises(PayloadTooLarge):
        read([b"x" * 2000], ends=False, limit=1024)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        read([b"{"], ends=True)


def test_a_compressed_body_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedMediaType, match="content-encoding gzip"):
        read([b"{}"], headers=((b"content-encoding", b"gzip"),))
    assert read([b"{}"], headers=((b"content-encoding", b"identity"),)) is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"prompt": "\ud800"}', "prompt"),
        (rb'{"messages": [{"role": "user", "content": "a\udc00"}]}', "messages[0].content"),
        (b'{"temperature": 1e400}', "temperature"),
        (b'{"logit_bias": {"5": -1e999}}', "logit_bias.5"),
    ],
)
def test_what_no_field_may_hold_is_named(body: bytes, param: str) -> None:
    with pytest.raises(
        InvalidRequest, match="surrogate pair, or a number that is not finite"
    ) as refused:
        read([body])
    assert refused.value.param == param


def test_large_bodies_are_parsed_one_after_another() -> None:
    """And small ones do not wait for them."""

    async def read(size: int, one_large: asyncio.Lock) -> int:
        body = json.dumps({"text": "x" * size}).encode()

        async def receive() -> dict:
            return {"type": "http.request", "body": body}

        fields = await read_object(SCOPE, receive, 10**6, one_large)
        return len(fields.text("text"))

    async def run() -> None:
        one_large = asyncio.Lock()
        async with one_large:
            large = [asyncio.create_task(read(100_000, one_large)) for _ in range(2)]
            assert await asyncio.wait_for(read(1000, one_large), 20) == 1000
            await asyncio.sleep(0)
            assert not any(task.done() for task in large)
        assert await asyncio.wait_for(asyncio.gather(*large), 20) == [100_000] * 2

    asyncio.run(run())
