"""Answers in pieces: server-sent events straight onto ASGI, and the watch for clients that leave.

`EventStream` opens the response with its first event (so that an early refusal can still have its
own status) or, when nothing comes for long, with a comment that keeps the connection alive. While
the transport holds back a slow reader, `write` waits and new tokens are merged behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


class EventStream:
    """The response of one streamed request.

    Args:
        send: ASGI's.
        heartbeat_s: no silence is longer; looked at twice in it.

    Attributes:
        started: whether the status has been sent.
    """

    def __init__(self, send: Any, heartbeat_s: float) -> None:
        self.started = False
        self._send = send
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._quiet = True
        self._writing = False
        self._beat: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(heartbeat_s / 2, self._on_timer)

    async def write(self, events: bytes) -> None:
        """Sends events; returns once the transport takes more."""
        if self._beat is not None and self._beat is not asyncio.current_task():
            await self._beat
        self._writing = True
        if not self.started:
            self.started = True
            await self._send(_START)
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self._quiet = self._writing = False

    async def end(self, events: bytes) -> None:
        """Sends the last events and closes the response."""
        self.close()
        if self._beat is not None:
            await self._beat
        if not self.started:
            self.started = True
            await self._send(_START)
        await self._send({"type": "http.response.body", "body": events})

    def close(self) -> None:
        """No more heartbeats."""
        self._timer.cancel()

    def _on_timer(self) -> None:
        if self._quiet and not self._writing:
            self._beat = asyncio.create_task(self.write(HEARTBEAT), name="jaxserve heartbeat")
            self._beat.add_done_callback(self._on_beat)
        self._quiet = True
        self._timer = self._loop.call_later(self._heartbeat_s / 2, self._on_timer)

    def _on_beat(self, task: asyncio.Task[None]) -> None:
        self._beat = None


class Departure:
    """Watches for the client's leaving while its request is worked on (`async with`).

    Attributes:
        gone: whether it has left.
    """

    def __init__(self, receive: Any, on_gone: Callable[[], None]) -> None:
        self.gone = False
        self._receive = receive
        self._on_gone = on_gone
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Departure:
        self._task = asyncio.create_task(self._watch(), name="jaxserve departure")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._on_gone()
