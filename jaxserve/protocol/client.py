"""The client of an engine: what HTTP workers and tests talk to.

A client numbers its sequences, submits prompts as token ids and hands out one `Stream` a request.
Messages from the engine go through `Dispatcher`, which finds the stream by sequence id; a stream
keeps at most one pending event a choice, so tokens of a slow reader are merged into it and harm
nobody. `EngineClient` is asyncio's; `sync_client.SyncClient` is the same for plain threads.

Invariants: all methods are called in one thread (the event loop's, or the offline caller's). Each
choice of a stream ends with exactly one event that carries `finished`, or the stream raises. When
the engine dies, every open stream raises `DeviceFailure`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import queue
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.protocol.messages import (
    Cancel,
    ClientMessage,
    Drain,
    EngineMessage,
    EngineStatus,
    GetStatus,
    Goodbye,
    Progress,
    StepStats,
)
from jaxserve.protocol.streams import Dispatcher, SequenceEvent, StreamState
from jaxserve.protocol.sync_client import SyncClient, SyncStream
from jaxserve.protocol.transport import (
    HEARTBEAT_S,
    MAX_PAUSE_S,
    ClientTransport,
    submit_message,
)
from jaxserve.types import FinishReason, SamplingParams

__all__ = ["ClientTransport", "EngineClient", "SequenceEvent", "Stream", "SyncClient", "SyncStream"]


class Stream:
    """The events of one request: `async for event in stream`, ends after the last choice's end.

    Raises, from the iteration: the typed error the engine refused the request with
    (`ContextTooLong`, `OutOfPages`, `Overloaded`, `InvalidRequest`), or `DeviceFailure`.
    Left early (`async with client.submit(…) as stream`), it cancels what still runs.

    Attributes:
        sequence_ids: of the choices, in order.
    """

    def __init__(self, client: EngineClient, state: StreamState) -> None:
        self._client = client
        self._state = state
        self._state.wake = self._on_event
        self._waiter: asyncio.Future[None] | None = None
        self.sequence_ids = state.sequence_ids

    @property
    def done(self) -> bool:
        """Whether every choice has ended (its events may still be unread)."""
        return self._state.done

    def cancel(
        self, choice: int | None = None, reason: FinishReason = FinishReason.CANCELLED
    ) -> None:
        """Ends one choice, or all that still run; each still delivers its `finished`.

        `reason` STOP tells the engine that a stop string matched.
        """
        ids = self._state.running(choice)
        if ids:
            self._client.send(Cancel(sequence_ids=ids, reason=reason))

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


class EngineClient:
    """An asyncio client of one engine.

    Use: `client = EngineClient(transport); await client.start(); await client.ready()`, then
    `async for event in client.submit(ids, sampling, n=2): …`, at the end `await client.close()`.

    Args:
        transport: the road to the engine.
        on_stats: called with each device call's `StepStats`, where given.
        on_progress: called with each `Progress` of start-up, where given.
        silence_s: an engine not heard of for so long counts as dead; longer than its longest step.
    """

    def __init__(
        self,
        transport: ClientTransport,
        *,
        on_stats: Callable[[StepStats], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        silence_s: float = 150.0,
    ) -> None:
        self._transport = transport
        self._dispatcher = Dispatcher(on_stats, on_progress)
        self._silence_s = silence_s
        self._heart: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._pidfd: int | None = None
        self._heard_ns = time.monotonic_ns()
        self._closed = False

    async def start(self) -> None:
        """Connects and begins to listen; does not wait for the engine to be ready."""
        loop = asyncio.get_running_loop()
        self._heard_ns = time.monotonic_ns()
        self._transport.open(_Mailbox(loop, self._receive).put)
        self._heart = asyncio.create_task(self._beat(), name="jaxserve engine heartbeat")

    @property
    def status(self) -> EngineStatus | None:
        """The engine's last word about itself, its step age brought up to now; None before one."""
        status = self._dispatcher.status
        if status is None:
            return None
        since_s = (time.monotonic_ns() - self._dispatcher.status_ns) / 1e9
        return dataclasses.replace(status, step_age_s=status.step_age_s + since_s)

    @property
    def progress(self) -> Progress | None:
        """How far start-up is; None before the first word of it."""
        return self._dispatcher.progress

    @property
    def error(self) -> JaxserveError | None:
        """Why the engine is dead; None while it is not known to be."""
        return self._dispatcher.error

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
    ) -> Stream:
        """Starts n sequences over one prompt and returns their stream at once.

        Args:
            prompt: token ids, at least one.
            sampling: filled in completely, seed included.
            n: choices; the choice index keys their random bits.
            priority: smaller is served first, and preempts.
            tenant: who is charged; opaque here.
            cache_salt: only requests with the same one share cached pages.
            weight: the tenant's share beside others'.
            arrived_ns: CLOCK_MONOTONIC when the request came in; now where None.

        Raises:
            DeviceFailure: the engine is known to be dead. All else is raised by the stream.
        """
        state = self._dispatcher.open(n)
        self.send(
            submit_message(
                state,
                prompt,
                sampling,
                priority=priority,
                tenant=tenant,
                cache_salt=cache_salt,
                weight=weight,
                arrived_ns=arrived_ns,
            )
        )
        return Stream(self, state)

    def send(self, message: ClientMessage) -> None:
        """Sends a message as it is; `submit`, `Stream.cancel` and `drain` are built on it."""
        self._transport.send(message)

    async def ready(self) -> EngineStatus:
        """Waits until the engine serves (or drains); its status then carries the model.

        Raises:
            DeviceFailure: it failed to start, with its one sentence, or died.
        """
        while True:
            if self._dispatcher.error is not None:
                raise self._dispatcher.error
            status = self.status
            if status is not None and status.state in ("ready", "draining"):
                return status
            self._changed.clear()
            await self._changed.wait()

    async def get_status(self) -> EngineStatus:
        """A fresh status from the engine.

        Raises:
            DeviceFailure: the engine is dead.
        """
        asked_ns = time.monotonic_ns()
        self.send(self._get_status())
        while self._dispatcher.status is None or self._dispatcher.status_ns < asked_ns:
            if self._dispatcher.error is not None:
                raise self._dispatcher.error
            self._changed.clear()
            await self._changed.wait()
        return self._dispatcher.status

    def drain(self) -> None:
        """Tells the engine to refuse new sequences; what runs or waits there finishes."""
        self.send(Drain())

    async def join(self) -> None:
        """Waits until no stream of this client runs (after `drain`, say)."""
        while self._dispatcher.num_streams:
            self._changed.clear()
            await self._changed.wait()

    def fail(self, error: JaxserveError) -> None:
        """Ends every stream with `error`: whoever watches the engine's process calls this.

        The client notices by itself when the engine's pid ends, or is silent for `silence_s`.
        """
        self._dispatcher.fail(error)
        self._changed.set()

    async def close(self) -> None:
        """Says goodbye (the engine cancels what still runs) and lets go of the transport."""
        if self._closed:
            return
        self._closed = True
        if self._heart is not None:
            self._heart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._heart
        self._unwatch()
        if self._dispatcher.error is None:
            self.send(Goodbye())
        self._transport.close()
        self._dispatcher.fail(DeviceFailure("the client of the engine was closed"))

    def _receive(self, message: EngineMessage) -> None:
        self._heard_ns = time.monotonic_ns()
        if self._dispatcher.dispatch(message):
            self._changed.set()
            if isinstance(message, EngineStatus):
                self._watch(message.pid)

    def _get_status(self) -> GetStatus:
        return GetStatus(stats=self._dispatcher.on_stats is not None)

    async def _beat(self) -> None:
        while True:
            self.send(self._get_status())
            before_ns = time.monotonic_ns()
            await asyncio.sleep(HEARTBEAT_S)
            paused_s = (time.monotonic_ns() - before_ns) / 1e9 - HEARTBEAT_S
            if paused_s > MAX_PAUSE_S:  # the engine may have given up on us, and say no more
                self.fail(DeviceFailure(f"this process stood still for {paused_s:.0f} s"))
            silent_s = (time.monotonic_ns() - self._heard_ns) / 1e9
            if silent_s > self._silence_s:
                self.fail(DeviceFailure(f"the engine has been silent for {silent_s:.0f} s"))

    def _watch(self, pid: int) -> None:
        """Has the event loop report the end of the engine's process, child of ours or not."""
        if self._pidfd is not None or pid == os.getpid() or not hasattr(os, "pidfd_open"):
            return
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_exit(pid)
        except OSError:
            return  # another pid namespace, or no such call here: heartbeats remain
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit, pid)

    def _on_exit(self, pid: int) -> None:
        self._unwatch()
        self.fail(DeviceFailure(f"the engine process (pid {pid}) has ended; try again shortly"))

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None


class _Mailbox:
    """Brings messages from a transport's thread into the event loop, one wake-up for many."""

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
