"""The client of an engine for code without an event loop: offline use, tests, scripts.

The same words as `client.EngineClient`, blocking; the caller's thread takes the messages in.

Invariants: as `client`, of an engine that is not supervised: its death ends every stream.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence

from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.protocol.messages import (
    AdapterRef,
    Cancel,
    ClientMessage,
    EngineMessage,
    Goodbye,
)
from jaxserve.protocol.parent import has_ended
from jaxserve.protocol.status import EngineStatus, Progress, StepStats
from jaxserve.protocol.streams import Dispatcher, SequenceEvent, StreamState
from jaxserve.protocol.transport import (
    HEARTBEAT_S,
    ClientTransport,
    Teller,
    embed_message,
    submit_message,
)
from jaxserve.types import EmbeddingParams, FinishReason, SamplingParams, Vocabulary


class SyncStream:
    """The events of one request, for plain `for event in stream`; else as `Stream`."""

    def __init__(self, client: SyncClient, state: StreamState) -> None:
        self._client = client
        self._state = state
        self.sequence_ids = state.sequence_ids

    @property
    def done(self) -> bool:
        """Whether every choice has ended (its events may still be unread)."""
        return self._state.done

    def cancel(
        self, choice: int | None = None, reason: FinishReason = FinishReason.CANCELLED
    ) -> None:
        """As `Stream.cancel`."""
        ids = self._state.running(choice)
        if ids:
            self._client.send(Cancel(sequence_ids=ids, reason=reason))

    def take(self) -> SequenceEvent | None:
        """The next event that is already here; None if there is none. Raises as iteration does."""
        return self._state.take()

    def __iter__(self) -> Iterator[SequenceEvent]:
        return self

    def __next__(self) -> SequenceEvent:
        while True:
            event = self._state.take()
            if event is not None:
                return event
            if self._state.done:
                raise StopIteration
            self._client.wait()


class SyncClient:
    """A client for code without an event loop: same words as `EngineClient`, blocking.

    Many streams may be open at once: `wait()` takes the engine's next messages in, and each
    stream's `take()` gives what has come for it.
    """

    def __init__(
        self,
        transport: ClientTransport,
        *,
        on_stats: Callable[[StepStats], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        silence_s: float = 150.0,
        vocabulary: Callable[[], Vocabulary] | None = None,
    ) -> None:
        self._transport = transport
        self._teller = Teller(vocabulary)
        self._dispatcher = Dispatcher(on_stats, on_progress)
        self._inbox: queue.SimpleQueue[EngineMessage] = queue.SimpleQueue()
        self._silence_s = silence_s
        self._heard_s = time.monotonic()
        self._closed = False

    def start(self) -> None:
        """Connects; does not wait for the engine to be ready."""
        self._transport.open(self._inbox.put)
        self.send(self._dispatcher.ask_status())

    @property
    def status(self) -> EngineStatus | None:
        """The engine's last word about itself; None before one."""
        return self._dispatcher.status

    @property
    def num_streams(self) -> int:
        """Streams that still run."""
        return self._dispatcher.num_streams

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        n: int = 1,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        weight: float = 1.0,
        arrived_ns: int | None = None,
        adapter: AdapterRef | None = None,
    ) -> SyncStream:
        """As `EngineClient.submit`."""
        state = self._dispatcher.open(n)
        message = submit_message(
            state,
            prompt,
            sampling,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            weight=weight,
            arrived_ns=arrived_ns,
            adapter=adapter,
        )
        self.send(self._dispatcher.begin(state, message))
        return SyncStream(self, state)

    def embed(
        self,
        texts: Sequence[Sequence[int]],
        params: EmbeddingParams,
        *,
        second_starts: Sequence[int] = (),
        priority: int = 0,
    ) -> SyncStream:
        """As `EngineClient.embed`."""
        state = self._dispatcher.open(len(texts))
        message = embed_message(
            state, texts, params, second_starts=second_starts, priority=priority
        )
        self.send(self._dispatcher.begin(state, message))
        return SyncStream(self, state)

    def send(self, message: ClientMessage) -> None:
        """Sends a message as it is."""
        self._teller.send(self._transport, message)

    def ready(self) -> EngineStatus:
        """Waits until the engine serves; raises `DeviceFailure` if it fails to start."""
        while True:
            if self._dispatcher.error is not None:
                raise self._dispatcher.error
            status = self._dispatcher.status
            if status is not None and status.state in ("ready", "draining"):
                return status
            self.wait()

    def get_status(self) -> EngineStatus:
        """As `EngineClient.get_status`."""
        question = self._dispatcher.ask_status()
        self.send(question)
        while (status := self._dispatcher.answer(question)) is None:
            self.wait()
        return status

    def wait(self) -> None:
        """Takes in what the engine has sent, blocking until there is something.

        Once the engine is known to be dead it returns at once: the streams raise.
        """
        if self._dispatcher.error is not None:
            return
        try:
            message = self._inbox.get(timeout=HEARTBEAT_S)
        except queue.Empty:
            self._look_after_engine()
            return
        self._heard_s = time.monotonic()
        self._dispatcher.dispatch(message)
        while not self._inbox.empty():
            self._dispatcher.dispatch(self._inbox.get())

    def _look_after_engine(self) -> None:
        """Nothing came for a while: the engine is busy, or dead."""
        status = self._dispatcher.status
        if status is not None and has_ended(status.pid):
            self.fail(DeviceFailure(f"the engine process (pid {status.pid}) has ended"))
        elif time.monotonic() - self._heard_s > self._silence_s:
            self.fail(DeviceFailure(f"the engine has been silent for {self._silence_s:.0f} s"))
        else:
            self.send(self._dispatcher.ask_status())

    def fail(self, error: JaxserveError) -> None:
        """Ends every stream with `error`."""
        self._dispatcher.fail(error)

    def close(self) -> None:
        """Says goodbye (the engine cancels what still runs) and lets go of the transport."""
        if self._closed:
            return
        self._closed = True
        if self._dispatcher.error is None:
            self.send(Goodbye())
        self._transport.close()
        self._dispatcher.fail(DeviceFailure("the client of the engine was closed"))
