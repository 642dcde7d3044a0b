"""Messages from a transport's thread, brought into the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable

from jaxserve.protocol.messages import EngineMessage


class Mailbox:
    """Hands messages to `receive` in the loop's thread, one wake-up for many."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, receive: Callable[[EngineMessage], None]
    ) -> None:
        self._loop = loop
        self._receive = receive
        self._messages: queue.SimpleQueue[EngineMessage] = queue.SimpleQueue()
        self._scheduled = False

    def put(self, message: EngineMessage) -> None:
        self._messages.put(message)
        if not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
                self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._scheduled = False  # before reading: a message put from here on wakes the loop again
        while not self._messages.empty():
            self._receive(self._messages.get())
