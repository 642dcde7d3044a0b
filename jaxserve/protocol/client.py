"""The client of an engine: what HTTP workers and tests talk to.

A client numbers its sequences, submits prompts as token ids and hands out one `Stream` a request.
Messages from the engine go through `Dispatcher`, which finds the stream by sequence id; a stream
keeps at most one pending event a choice, so tokens of a slow reader are merged into it and harm
nobody. `EngineClient` is asyncio's; `sync_client.SyncClient` is the same for plain threads.

Invariants: all methods are called in one thread (the event loop's, or the offline caller's). Each
choice of a stream ends with exactly one event that carries `finished`, or the stream raises. When
the engine dies for good, every open stream raises `DeviceFailure`.

Where the engine is supervised, a death is not for good: between `down` and the next life's first
"ready" (`reconnect`) streams stay open, cancels end their choices at once, and what is submitted
waits. Then all unfinished requests are submitted again (`protocol.replay`). Each life has a road of
its own, so that nothing one life said or was sent reaches another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.protocol.mailbox import Mailbox
from jaxserve.protocol.messages import (
    AdapterRef,
    Cancel,
    ClientMessage,
    Drain,
    Embed,
    EngineMessage,
    Goodbye,
    Submit,
)
from jaxserve.protocol.pulse import Pulse
from jaxserve.protocol.status import EngineStatus, Progress, StepStats
from jaxserve.protocol.stream import Stream
from jaxserve.protocol.streams import RESTARTING, Dispatcher, SequenceEvent, StreamState
from jaxserve.protocol.sync_client import SyncClient, SyncStream
from jaxserve.protocol.transport import ClientTransport, Teller, embed_message, submit_message
from jaxserve.types import EmbeddingParams, FinishReason, SamplingParams, Vocabulary

__all__ = ["ClientTransport", "EngineClient", "SequenceEvent", "Stream", "SyncClient", "SyncStream"]

#: States of an engine that takes requests, or finishes those that it has.
_SERVING = ("ready", "draining")


class EngineClient:
    """An asyncio client of one engine.

    Use: `client = EngineClient(transport); await client.start(); await client.ready()`, then
    `async for event in client.submit(ids, sampling, n=2): …`, at the end `await client.close()`.

    Args:
        transport: the road to the engine.
        on_stats: called with each device call's `StepStats`, where given.
        on_progress: called with each `Progress` of start-up, where given.
        silence_s: an engine not heard of for so long counts as dead; longer than its longest step.
        supervised: somebody else watches the engine's process, and says `down` and `reconnect`, or
            `fail`; silence and the process's end are nothing to this client then.
        on_pause: called where this process stood still for so long that the engine may have given
            it up; to say `down` and `reconnect` to the same engine. None: that is the end.
        on_replay: called, each time they change, with the requests that went on in another engine
            so far, and with those that were refused for ending it each time.
        vocabulary: makes what an engine is sent before the first request that has a grammar.
    """

    def __init__(
        self,
        transport: ClientTransport,
        *,
        on_stats: Callable[[StepStats], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        silence_s: float = 150.0,
        supervised: bool = False,
        on_pause: Callable[[], None] | None = None,
        on_replay: Callable[[int, int], None] = lambda replayed, quarantined: None,
        vocabulary: Callable[[], Vocabulary] | None = None,
    ) -> None:
        self._on_replay = on_replay
        self._teller = Teller(vocabulary)
        self._num_replayed = 0
        self._transport: ClientTransport | None = transport  # None: between two lives
        self._dispatcher = Dispatcher(on_stats, on_progress, journal=supervised)
        self._supervised = supervised
        self._life = 0
        self._restarting = False  # from `down` until the next life's first "ready"
        self._down_ns = 0
        self._before: EngineStatus | None = None  # of the last life that served
        self._draining = False
        self._changed = asyncio.Event()
        self._closed = False
        self._pulse = Pulse(
            lambda: self.send(self._dispatcher.ask_status()),
            self.fail,
            silence_s=silence_s,
            supervised=supervised,
            on_pause=on_pause,
        )

    async def start(self) -> None:
        """Connects and begins to listen; does not wait for the engine to be ready."""
        assert self._transport is not None
        self._open_road(self._transport)
        self._pulse.start()

    @property
    def status(self) -> EngineStatus | None:
        """The engine's last word about itself, its step age brought up to now; None before one."""
        status = self._dispatcher.status
        if status is None:
            return None
        since_s = (time.monotonic_ns() - self._dispatcher.status_ns) / 1e9
        status = dataclasses.replace(status, step_age_s=status.step_age_s + since_s)
        if self._restarting:
            before = self._before or status  # the model, and what it holds, will be as before
            status = dataclasses.replace(
                status,
                state=RESTARTING,
                model=before.model,
                embedding=before.embedding,
                pages_total=before.pages_total,
            )
        return status

    @property
    def progress(self) -> Progress | None:
        """How far start-up is; None before the first word of it."""
        return self._dispatcher.progress

    @property
    def error(self) -> JaxserveError | None:
        """Why the engine is dead for good; None while it is not known to be."""
        return self._dispatcher.error

    @property
    def down_s(self) -> float:
        """For how long the engine that serves this client has been dead; 0 while one does."""
        return (time.monotonic_ns() - self._down_ns) / 1e9 if self._restarting else 0.0

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
        traceparent: str = "",
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
            adapter: a LoRA adapter; None for the base model.
            traceparent: the caller's span, as W3C trace context; empty where nothing is traced.

        Raises:
            DeviceFailure: the engine is known to be dead. All else is raised by the stream.
        """
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
            traceparent=traceparent,
        )
        return self._begin(state, message)

    def embed(
        self,
        texts: Sequence[Sequence[int]],
        params: EmbeddingParams,
        *,
        second_starts: Sequence[int] = (),
        priority: int = 0,
        tenant: str = "",
        weight: float = 1.0,
        arrived_ns: int | None = None,
        traceparent: str = "",
    ) -> Stream:
        """Asks for the vectors of some texts; each is a choice, whose one event has it.

        Args:
            texts: token ids of each, at least one.
            second_starts: where each pair's second text begins, for a cross-encoder.
            priority, tenant, weight, arrived_ns, traceparent: as of `submit`, which this raises
                as.
        """
        state = self._dispatcher.open(len(texts))
        message = embed_message(
            state,
            texts,
            params,
            second_starts=second_starts,
            priority=priority,
            tenant=tenant,
            weight=weight,
            arrived_ns=arrived_ns,
            traceparent=traceparent,
        )
        return self._begin(state, message)

    def cancel(self, state: StreamState, choice: int | None, reason: FinishReason) -> None:
        """As `Stream.cancel`, which is built on it."""
        ids = state.running(choice)
        if not ids:
            return
        state.cancelling(ids, reason)
        if self._restarting:
            self._dispatcher.end_cancelled(state)
            self._changed.set()
        else:
            self.send(Cancel(sequence_ids=ids, reason=reason))

    def send(self, message: ClientMessage) -> None:
        """Sends a message as it is; `submit`, `cancel` and `drain` are built on it."""
        if self._transport is not None:
            self._teller.send(self._transport, message)

    async def ready(self) -> EngineStatus:
        """Waits until the engine serves (or drains); its status then carries the model.

        Raises:
            DeviceFailure: it failed to start, with its one sentence, or died.
        """
        while True:
            if self._dispatcher.error is not None:
                raise self._dispatcher.error
            status = self.status
            if status is not None and status.state in _SERVING:
                return status
            self._changed.clear()
            await self._changed.wait()

    async def get_status(self) -> EngineStatus:
        """The engine's status once it has taken in all that was sent before this call.

        Raises:
            DeviceFailure: the engine is dead.
        """
        question = self._dispatcher.ask_status()
        self.send(question)
        while (status := self._dispatcher.answer(question)) is None:
            self._changed.clear()
            await self._changed.wait()
        return status

    def drain(self) -> None:
        """Tells the engine to refuse new sequences; what runs or waits there finishes."""
        self._draining = True
        if not self._restarting:
            self.send(Drain())

    async def join(self) -> None:
        """Waits until no stream of this client runs (after `drain`, say)."""
        while self._dispatcher.num_streams:
            self._changed.clear()
            await self._changed.wait()

    def fail(self, error: JaxserveError) -> None:
        """Ends every stream with `error`: whoever watches the engine's process calls this.

        The client notices by itself when the engine's pid ends, or is silent for `silence_s`,
        unless it is supervised.
        """
        self._dispatcher.fail(error)
        self._changed.set()

    def down(self) -> None:
        """The engine's process has ended, and will be started again: streams wait for it.

        Nothing that it may still have said is heard.
        """
        assert self._supervised, "nothing is kept to go on with"
        if self._closed or self.error is not None:
            return
        self._life += 1
        if not self._restarting:
            self._restarting = True
            self._down_ns = time.monotonic_ns()
            self._before = self._dispatcher.status
        if self._transport is not None:
            self._transport.abandon()
            self._transport = None
        self._dispatcher.lose()
        self._changed.set()

    def reconnect(self, transport: ClientTransport) -> None:
        """Another engine has been started: what is unfinished goes on there, once it is ready.

        Args:
            transport: the road to it; not opened yet.
        """
        if self._closed or self.error is not None:
            return
        assert self._transport is None, "the life before has not been said to be down"
        self._transport = transport
        self._open_road(transport)
        self.send(self._dispatcher.ask_status())

    async def close(self) -> None:
        """Says goodbye (the engine cancels what still runs) and lets go of the transport."""
        if self._closed:
            return
        self._closed = True
        await self._pulse.stop()
        if self._transport is not None:
            if self._dispatcher.error is None:
                self._transport.send(Goodbye())
                self._transport.close()
            else:
                self._transport.abandon()  # nobody is there to take in what is queued
        self._dispatcher.fail(DeviceFailure("the client of the engine was closed"))

    def _begin(self, state: StreamState, message: Submit | Embed) -> Stream:
        """Sends a stream's first message, or keeps it until an engine serves."""
        serving = not self._restarting
        message = self._dispatcher.begin(state, message, sent=serving)
        if serving:
            self.send(message)
        return Stream(self, state)

    def _open_road(self, transport: ClientTransport) -> None:
        life = self._life

        def receive(message: EngineMessage) -> None:
            if life == self._life:
                self._receive(message)

        self._pulse.heard()
        transport.open(Mailbox(asyncio.get_running_loop(), receive).put)

    def _receive(self, message: EngineMessage) -> None:
        self._pulse.heard()
        num_quarantined = self._dispatcher.num_quarantined
        if self._dispatcher.dispatch(message):
            self._changed.set()
            if self._dispatcher.num_quarantined != num_quarantined:
                self._on_replay(self._num_replayed, self._dispatcher.num_quarantined)
            if isinstance(message, EngineStatus):
                if self._restarting and message.state in _SERVING:
                    self._go_on()
                self._pulse.watch(message.pid)

    def _go_on(self) -> None:
        """Another life serves: submits what is unfinished, and asks for what else is wanted of it.

        Whatever state of the engine clients ask for (runtime adapters, once there are some) is
        kept by the client and asked for again here.
        """
        self._restarting = False
        messages = self._dispatcher.replay()
        for message in messages:
            self.send(message)
        self._num_replayed += len(messages)
        self._on_replay(self._num_replayed, self._dispatcher.num_quarantined)
        if self._draining:  # after the requests, which were let in before it
            self.send(Drain())
