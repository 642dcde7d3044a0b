"""Where a client keeps what has come for its sequences and has not been read yet.

`Dispatcher` takes each message of the engine apart and adds it to the `StreamState` of its
sequence; `client` wraps the states for asyncio and for plain threads. No waiting happens here.

Invariant: a stream holds at most one pending event a choice. Until the reader takes it, further
tokens are merged into it, so memory is bounded by the tokens themselves and order is kept. `wake`
is called once for what a reader has not looked at yet; it only notes that there is something.

Where the engine is started again after its end, streams keep a journal (`protocol.replay`): `lose`
leaves them open, `replay` gives the messages that continue them, under new sequence ids, so that
nothing an earlier life said can be taken for theirs.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve import errors
from jaxserve.errors import DeviceFailure, JaxserveError, RequestQuarantined
from jaxserve.protocol.messages import (
    Embed,
    EngineMessage,
    Finished,
    GetStatus,
    SequenceRecord,
    Submit,
    TokenEvents,
)
from jaxserve.protocol.replay import JournalEntry, request_keys
from jaxserve.protocol.status import EngineStatus, Progress, StepStats
from jaxserve.types import FinishReason, TokenLogprobs

#: State of an engine that has ended and is started again, as its clients call it.
RESTARTING = "restarting"


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
        sequence_ids: of the choices, in order; others after a replay.
        wake: called when there is something to take and there was nothing before, or at the end.
        at_end: called once no choice runs any more.
        records: by choice, what the engine said of those that it has ended, read or not.
        journal: what is kept to go on in another life of the engine; None: nothing is.
    """

    __slots__ = (
        "_error",
        "_first_id",
        "_pending",
        "_ready",
        "_running",
        "at_end",
        "journal",
        "records",
        "sequence_ids",
        "wake",
    )

    def __init__(self, sequence_ids: range) -> None:
        self.sequence_ids = sequence_ids
        self.wake: Callable[[], None] = _nobody
        self.at_end: Callable[[], None] = _nobody
        self.records: dict[int, SequenceRecord] = {}
        self.journal: JournalEntry | None = None
        self._first_id = sequence_ids[0]
        self._pending: list[SequenceEvent | None] = [None] * len(sequence_ids)
        self._ready: deque[int] = deque()
        self._running = set(sequence_ids)
        self._error: JaxserveError | None = None

    @property
    def done(self) -> bool:
        """Whether no choice runs any more."""
        return not self._running

    @property
    def failed(self) -> bool:
        """Whether it ends by raising."""
        return self._error is not None

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
        journal = self.journal
        if journal is not None and token_ids:
            journal.emitted[choice] += token_ids
            journal.first_token_ns[choice] = journal.first_token_ns[choice] or at_ns
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

    def add_prompt_logprobs(self, sequence_id: int, entries: list[TokenLogprobs]) -> None:
        """Adds log-probabilities of prompt tokens to the choice's pending event."""
        self.pending(sequence_id).prompt_logprobs += entries
        if self.journal is not None:
            self.journal.num_prompt_logprobs += len(entries)

    def cancelling(self, sequence_ids: list[int], reason: FinishReason) -> None:
        """The engine was asked to end these."""
        if self.journal is not None:
            for sequence_id in sequence_ids:
                self.journal.cancelled.setdefault(sequence_id - self._first_id, reason)

    def end_cancelled(self, now_ns: int) -> list[int]:
        """Ends the choices that were asked to, where no engine is left to confirm it; their ids."""
        assert self.journal is not None
        ended = []
        for choice, reason in self.journal.cancelled.items():
            sequence_id = self.sequence_ids[choice]
            if sequence_id in self._running:
                ended.append(sequence_id)
                self.finish(self.journal.end(choice, sequence_id, reason, now_ns))
        return ended

    def replay(self, sequence_ids: range) -> Submit | Embed:
        """Continues what still runs under new ids; the message that asks for it."""
        assert self.journal is not None
        choices = [sequence_id - self._first_id for sequence_id in sorted(self._running)]
        message = self.journal.again(sequence_ids, choices)
        self.sequence_ids, self._first_id = sequence_ids, sequence_ids[0]
        self._running = set(message.sequence_ids)
        return message

    @property
    def num_choices(self) -> int:
        """Sequences that it began with."""
        return len(self._pending)

    def finish(self, finished: Finished) -> None:
        """Ends one choice; an engine's refusal or failure ends the whole stream by raising."""
        self._running.discard(finished.sequence_id)
        choice = finished.sequence_id - self._first_id
        if self.journal is not None:
            self.journal.complete(choice, finished.record)
        self.records[choice] = finished.record
        if finished.reason is FinishReason.ERROR:
            if self._error is None:
                self._error = error_from(finished)
            self.wake()
        else:
            self.pending(finished.sequence_id).finished = finished
        if not self._running:
            self.at_end()

    def fail(self, error: JaxserveError) -> None:
        """Ends all choices that still run with `error`."""
        if self._running:
            self._running.clear()
            self._error = self._error or error
            self.wake()
            self.at_end()


class Dispatcher:
    """Finds the stream of each sequence in the engine's messages.

    Args:
        journal: whether streams outlive the engine: whoever owns the dispatcher says when it has
            ended (`lose`) and when another one serves (`replay`).

    Attributes:
        status, status_ns: the engine's last status and when it came.
        error: why the engine is dead for good, once it is; nothing can be opened any more.
        num_quarantined: requests that were refused for killing the engine.
    """

    def __init__(
        self,
        on_stats: Callable[[StepStats], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        journal: bool = False,
    ) -> None:
        self.on_stats = on_stats
        self.on_progress = on_progress
        self.status: EngineStatus | None = None
        self.status_ns = 0
        self.progress: Progress | None = None
        self.error: JaxserveError | None = None
        self.num_quarantined = 0
        self._journal = journal
        self._next_key = request_keys()
        self._next_id = 0
        self._num_asked = 0
        self._streams: dict[int, StreamState] = {}  # by id of a sequence that still runs

    def ask_status(self) -> GetStatus:
        """A new question after the engine's status, to be sent."""
        self._num_asked += 1
        return GetStatus(stats=self.on_stats is not None, number=self._num_asked)

    def answer(self, question: GetStatus) -> EngineStatus | None:
        """The answer to that question, or to a later one; None while there is none.

        Raises:
            JaxserveError: there will be none, since the engine is dead.
        """
        if self.error is not None:
            raise self.error
        status = self.status
        return status if status is not None and status.answers >= question.number else None

    @property
    def num_streams(self) -> int:
        """Streams with a choice that still runs."""
        return len(self._open_streams())

    def open(self, n: int) -> StreamState:
        """A stream of n new sequence ids.

        Raises:
            DeviceFailure: the engine is dead.
        """
        if self.error is not None:
            raise DeviceFailure(self.error.message)
        state = StreamState(self._new_ids(n))
        for sequence_id in state.sequence_ids:
            self._streams[sequence_id] = state
        return state

    def begin[Message: Submit | Embed](
        self, state: StreamState, message: Message, *, sent: bool = True
    ) -> Message:
        """Gives a stream's first message its key, and keeps it where there is a journal.

        Args:
            sent: whether it is about to be sent; else `replay` gives it when there is an engine.
        """
        message = dataclasses.replace(message, request_key=self._next_key())
        if self._journal:
            state.journal = JournalEntry(message, sent=sent)
        return message

    def lose(self) -> None:
        """The engine has ended and another will be started: streams stay open.

        What was to be cancelled ends here, since nobody will confirm it.
        """
        if self.status is not None:
            self.status = dataclasses.replace(self.status, state=RESTARTING)
        now_ns = time.monotonic_ns()
        for state in self._open_streams():
            if state.journal is not None:
                state.journal.lose(now_ns)
            self.end_cancelled(state)

    def end_cancelled(self, state: StreamState) -> None:
        """Ends a stream's choices that were asked to end, without the engine."""
        for sequence_id in state.end_cancelled(time.monotonic_ns()):
            del self._streams[sequence_id]

    def replay(self) -> list[Submit | Embed]:
        """Another engine serves: the messages that continue every open stream, oldest first."""
        states = self._open_streams()
        self._streams.clear()
        messages = []
        for state in states:
            message = state.replay(self._new_ids(len(state.sequence_ids)))
            self._streams.update(dict.fromkeys(message.sequence_ids, state))
            messages.append(message)
        return messages

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
                if message.state == "failed" and not self._journal:
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
                state.add_prompt_logprobs(sequence_id, entries)
        for finished in events.finished:
            if finished.reason is FinishReason.ERROR and self._goes_on(finished):
                continue
            if (state := self._streams.pop(finished.sequence_id, None)) is not None:
                state.finish(finished)
        return bool(events.finished)

    def _open_streams(self) -> list[StreamState]:
        return list(dict.fromkeys(self._streams.values()))

    def _new_ids(self, n: int) -> range:
        ids = range(self._next_id, self._next_id + n)
        self._next_id += n
        return ids

    def _goes_on(self, finished: Finished) -> bool:
        """Whether it is the engine that failed, and another will go on."""
        if finished.error_code == RequestQuarantined.code:
            state = self._streams.get(finished.sequence_id)
            self.num_quarantined += state is not None and not state.failed
        return self._journal and finished.error_code == DeviceFailure.code


def error_from(finished: Finished) -> JaxserveError:
    """The exception that a `Finished` with reason ERROR stands for."""
    kind = _errors_by_code().get(finished.error_code, DeviceFailure)
    return kind(finished.error, param=finished.error_param, retry_after_s=finished.retry_after_s)


def _errors_by_code() -> dict[str, type[JaxserveError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return {kind.code: kind for kind in kinds if issubclass(kind, JaxserveError)}


def _nobody() -> None:
    """Nobody waits for this stream."""
