"""One request as its asyncio reader sees it; `client.EngineClient.submit` gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.streams import SequenceEvent, StreamState
from jaxserve.types import FinishReason

if TYPE_CHECKING:
    from jaxserve.protocol.client import EngineClient


class Stream:
    """The events of one request: `async for event in stream`, ends after the last choice's end.

    Raises, from the iteration: the typed error the engine refused the request with
    (`ContextTooLong`, `OutOfPages`, `Overloaded`, `InvalidRequest`, `RequestQuarantined`), or
    `DeviceFailure`.
    Left early (`async with client.submit(…) as stream`), it cancels what still runs.
    """

    def __init__(self, client: EngineClient, state: StreamState) -> None:
        self._client = client
        self._state = state
        self._state.wake = self._on_event
        self._waiter: asyncio.Future[None] | None = None

    @property
    def sequence_ids(self) -> range:
        """Of the choices, in order; others once the request goes on in another engine."""
        return self._state.sequence_ids

    @property
    def done(self) -> bool:
        """Whether every choice has ended (its events may still be unread)."""
        return self._state.done

    @property
    def records(self) -> dict[int, SequenceRecord]:
        """By choice, of those that the engine has ended, what it said of them; read or not."""
        return self._state.records

    @property
    def num_choices(self) -> int:
        """Sequences that it began with."""
        return self._state.num_choices

    def at_end(self, call: Callable[[], None]) -> None:
        """Has `call` called once no choice runs any more, which must not be so yet."""
        self._state.at_end = call

    def cancel(
        self, choice: int | None = None, reason: FinishReason = FinishReason.CANCELLED
    ) -> None:
        """Ends one choice, or all that still run; each still delivers its `finished`.

        `reason` STOP tells the engine that a stop string matched.
        """
        self._client.cancel(self._state, choice, reason)

    def take(self) -> SequenceEvent | None:
        """The next event that is already here; None if there is none. Raises as iteration does."""
        return self._state.take()

    def watch(self, wake: Callable[[], None]) -> None:
        """Has `wake` called when there is something to take: for readers of several streams.

        Replaces iteration: such a reader uses `take` and `done`.
        """
        self._state.wake = wake

    def __aiter__(self) -> AsyncIterator[SequenceEvent]:
        return self

    async def __anext__(self) -> SequenceEvent:
        while True:
            event = self._state.take()
            if event is not None:
                return event
            if self._state.done:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def _on_event(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
