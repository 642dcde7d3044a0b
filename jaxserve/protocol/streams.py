"""Where a client keeps what has come for its sequences and has not been read yet.

`Dispatcher` takes each message of the engine apart and adds it to the `StreamState` of its
sequence; `client` wraps the states for asyncio and for plain threads. No waiting happens here.

Invariant: a stream holds at most one pending event a choice. Until the reader takes it, further
tokens are merged into it, so memory is bounded by the tokens themselves and order is kept. `wake`
is called once for what a reader has not looked at yet; it only notes that there is something.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve import errors
from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.protocol.messages import (
    EngineMessage,
    EngineStatus,
    Finished,
    Progress,
    StepStats,
    TokenEvents,
)
from jaxserve.types import FinishReason, TokenLogprobs


@dataclass(slots=True)
class SequenceEvent:
    """What has come for one choice since its reader last looked.

    Attributes:
        choice: index among the request's n.
        token_ids: new tokens, oldest first; may be empty in a last event.
        step_id, at_ns: the latest step in it, and when its tokens were read back.
        logprobs: one entry per new token, if asked for.
        prompt_logprobs: entries of prompt tokens after the first, in order, if asked for; they
            come with choice 0 only.
        finished: set in the choice's last event.
    """

    choice: int
    token_ids: list[int] = field(default_factory=list)
    step_id: int = -1
    at_ns: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished | None = None


class StreamState:
    """The choices of one request: what is pending for each, and which still run.

    Attributes:
        wake: called when there is something to take and there was nothing before, or at the end.
    """

    __slots__ = ("_error", "_first_id", "_pending", "_ready", "_running", "sequence_ids", "wake")

    def __init__(self, sequence_ids: range) -> None:
        self.sequence_ids = sequence_ids
        self.wake: Callable[[], None] = _nobody
        self._first_id = sequence_ids[0]
        self._pending: list[SequenceEvent | None] = [None] * len(sequence_ids)
        self._ready: deque[int] = deque()
        self._running = set(sequence_ids)
        self._error: JaxserveError | None = None

    @property
    def done(self) -> bool:
        """Whether no choice runs any more."""
        return not self._running

    def running(self, choice: int | None) -> list[int]:
        """Sequence ids that still run: of one choice, or of all."""
        if choice is None:
            return sorted(self._running)
        sequence_id = self.sequence_ids[choice]
        return [sequence_id] if sequence_id in self._running else []

    def take(self) -> SequenceEvent | None:
        """The choice's event that has waited longest; None if nothing is pending.

        Raises:
            JaxserveError: the stream failed, and what came before has been taken.
        """
        if self._ready:
            choice = self._ready.popleft()
            event = self._pending[choice]
            self._pending[choice] = None
            return event
        if self._error is not None:
            raise self._error
        return None

    def add(self, sequence_id: int, token_ids: list[int], step_id: int, at_ns: int) -> None:
        """Adds tokens to the choice's pending event. The list becomes the event's own."""
        choice = sequence_id - self._first_id
        event = self._pending[choice]
        if event is None:
            self._pending[choice] = SequenceEvent(choice, token_ids, step_id, at_ns)
            self._ready.append(choice)
            if len(self._ready) == 1:
                self.wake()
        else:
            event.token_ids += token_ids
            event.step_id = step_id
            event.at_ns = at_ns

    def pending(self, sequence_id: int) -> SequenceEvent:
        """The event to add other things to: the pending one, or a new one."""
        choice = sequence_id - self._first_id
        if self._pending[choice] is None:
            self.add(sequence_id, [], -1, 0)
        event = self._pending[choice]
        assert event is not None, "a stream's `wake` must not take at once"
        return event

    def finish(self, finished: Finished) -> None:
        """Ends one choice; an engine's refusal or failure ends the whole stream by raising."""
        self._running.discard(finished.sequence_id)
        if finished.reason is FinishReason.ERROR:
            if self._error is None:
                self._error = error_from(finished)
            self.wake()
        else:
            self.pending(finished.sequence_id).finished = finished

    def fail(self, error: JaxserveError) -> None:
        """Ends all choices that still run with `error`."""
        if self._running:
            self._running.clear()
            self._error = self._error or error
            self.wake()


class Dispatcher:
    """Finds the stream of each sequence in the engine's messages.

    Attributes:
        status, status_ns: the engine's last status and when it came.
        error: why the engine is dead, once it is; nothing can be opened any more.
    """

    def __init__(
        self,
        on_stats: Callable[[StepStats], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.on_stats = on_stats
        self.on_progress = on_progress
        self.status: EngineStatus | None = None
        self.status_ns = 0
        self.progress: Progress | None = None
        self.error: JaxserveError | None = None
        self._next_id = 0
        self._streams: dict[int, StreamState] = {}  # by id of a sequence that still runs

    @property
    def num_streams(self) -> int:
        """Streams with a choice that still runs."""
        return len({id(state) for state in self._streams.values()})

    def open(self, n: int) -> StreamState:
        """A stream of n new sequence ids.

        Raises:
            DeviceFailure: the engine is dead.
        """
        if self.error is not None:
            raise DeviceFailure(self.error.message)
        state = StreamState(range(self._next_id, self._next_id + n))
        self._next_id += n
        for sequence_id in state.sequence_ids:
            self._streams[sequence_id] = state
        return state

    def dispatch(self, message: EngineMessage) -> bool:
        """Takes in one message; whether more than tokens changed (a status, an end of a stream)."""
        match message:
            case TokenEvents():
                return self._dispatch_tokens(message)
            case StepStats():
                if self.on_stats is not None:
                    self.on_stats(message)
                return False
            case Progress():
                self.progress = message
                if self.on_progress is not None:
                    self.on_progress(message)
            case EngineStatus():
                self.status = message
                self.status_ns = time.monotonic_ns()
                if message.state == "failed":
                    self.fail(DeviceFailure(message.error or "the engine failed"))
        return True

    def fail(self, error: JaxserveError) -> None:
        """The engine is dead: ends every stream with `error`."""
        if self.error is None:
            self.error = error
        streams = list(self._streams.values())
        self._streams.clear()
        for state in streams:
            state.fail(error)

    def _dispatch_tokens(self, events: TokenEvents) -> bool:
        find = self._streams.get
        step_id, at_ns = events.step_id, events.at_ns
        # Each token passes here: keep it small.
        for sequence_id, token_ids in zip(events.sequence_ids, events.token_ids, strict=True):
            if (state := find(sequence_id)) is not None:
                state.add(sequence_id, token_ids, step_id, at_ns)
        for sequence_id, entries in events.logprobs.items():
            if (state := find(sequence_id)) is not None:
                state.pending(sequence_id).logprobs += entries
        for sequence_id, entries in events.prompt_logprobs.items():
            if (state := find(sequence_id)) is not None:
                state.pending(sequence_id).prompt_logprobs += entries
        for finished in events.finished:
            if (state := self._streams.pop(finished.sequence_id, None)) is not None:
                state.finish(finished)
        return bool(events.finished)


def error_from(finished: Finished) -> JaxserveError:
    """The exception that a `Finished` with reason ERROR stands for."""
    kind = _errors_by_code().get(finished.error_code, DeviceFailure)
    return kind(finished.error, param=finished.error_param)


def _errors_by_code() -> dict[str, type[JaxserveError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return {kind.code: kind for kind in kinds if issubclass(kind, JaxserveError)}


def _nobody() -> None:
    """Nobody waits for this stream."""
