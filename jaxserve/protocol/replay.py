"""What a client keeps of each unfinished request, so that another life of the engine can go on.

A `JournalEntry` holds the request as it was sent and what has come of it. When the engine's process
ends, `again` makes the message by which the next one continues: the choices that are unfinished,
each with the tokens that its reader has or will get. Random bits are keyed by seed, choice and
position, so the stream goes on as if nothing had been.

Kept by `streams.StreamState`, for clients whose engine is started again (`EngineClient`).

Invariants: a token is in `emitted` from the moment it is the reader's, and not before: nothing is
sent twice and nothing is missing. A choice whose cancel was not confirmed is not continued.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve.protocol.messages import Embed, Finished, Interval, SequenceRecord, Submit
from jaxserve.types import FinishReason


@dataclass(slots=True)
class JournalEntry:
    """One unfinished request.

    Attributes:
        submit: as it was first sent.
        emitted: output tokens of each choice.
        first_token_ns: of each choice, when its first token was read back; 0 before.
        num_prompt_logprobs: entries of prompt log-probabilities that have come.
        cancelled: choices whose end was asked for and is not confirmed, with the reason.
        attempt: lives of the engine that have ended under it.
        sent: whether an engine has been asked for it at all; not if it came between two lives.
        waited: between two lives, each time; lost_ns: since when it does now, 0 where it does not.
    """

    submit: Submit | Embed
    emitted: list[list[int]] = field(init=False)
    first_token_ns: list[int] = field(init=False)
    num_prompt_logprobs: int = 0
    cancelled: dict[int, FinishReason] = field(default_factory=dict)
    attempt: int = 0
    sent: bool = True
    waited: list[Interval] = field(default_factory=list)
    lost_ns: int = 0

    def __post_init__(self) -> None:
        if not self.sent:
            self.lose(time.monotonic_ns())
        num_choices = len(self.submit.sequence_ids)
        self.emitted = [[] for _ in range(num_choices)]
        self.first_token_ns = [0] * num_choices

    def lose(self, now_ns: int) -> None:
        """No engine runs it from now on."""
        self.lost_ns = self.lost_ns or now_ns

    def again(
        self, sequence_ids: range, choices: list[int], now_ns: int | None = None
    ) -> Submit | Embed:
        """The message that continues these choices.

        Args:
            sequence_ids: new ones, of all the request's choices.
            now_ns: CLOCK_MONOTONIC; now where None.
        """
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        self.waited = self._waited(now_ns)
        self.lost_ns = 0
        waited = list(self.waited)
        if not self.sent and len(choices) == len(sequence_ids):
            self.sent = True
            return dataclasses.replace(self.submit, sequence_ids=list(sequence_ids), waited=waited)
        self.attempt += 1
        if isinstance(self.submit, Embed):  # texts come out whole, or not at all
            ids = [sequence_ids[choice] for choice in choices]
            return dataclasses.replace(
                some_texts(self.submit, choices),
                sequence_ids=ids,
                attempt=self.attempt,
                waited=waited,
            )
        return dataclasses.replace(
            self.submit,
            sequence_ids=[sequence_ids[choice] for choice in choices],
            attempt=self.attempt,
            choices=choices,
            emitted=[list(self.emitted[choice]) for choice in choices],
            queued_ns=[self._queued_ns(choice, now_ns) for choice in choices],
            prompt_logprobs_done=self.num_prompt_logprobs,
            waited=waited,
        )

    def complete(self, choice: int, record: SequenceRecord) -> None:
        """Adds to the last engine's record of a choice what only the earlier ones knew."""
        record.replays = self.attempt
        if self.attempt and self.first_token_ns[choice]:
            first_ns = record.first_token_ns = self.first_token_ns[choice]
            record.queued_ns = min(record.queued_ns, first_ns)
            record.scheduled_ns = min(record.scheduled_ns, first_ns)

    def end(self, choice: int, sequence_id: int, reason: FinishReason, now_ns: int) -> Finished:
        """The end of a choice that no engine runs any more."""
        prompt_tokens = num_prompt_tokens(self.submit, choice)
        num_emitted = len(self.emitted[choice])
        record = SequenceRecord(
            prompt_tokens=prompt_tokens,
            output_tokens=num_emitted,
            computed_tokens=prompt_tokens + num_emitted - 1 if num_emitted else 0,
            context_tokens=prompt_tokens + num_emitted,
            replays=self.attempt,
            arrived_ns=self.submit.arrived_ns,
            first_token_ns=self.first_token_ns[choice],
            done_ns=now_ns,
            intervals=self._waited(now_ns),
            traceparent=self.submit.traceparent,
        )
        return Finished(sequence_id=sequence_id, reason=reason, record=record)

    def _queued_ns(self, choice: int, now_ns: int) -> int:
        """How long a choice has waited for its first token while there was an engine."""
        first_ns = self.first_token_ns[choice] or now_ns
        none = (wait.end_ns - wait.start_ns for wait in self.waited if wait.end_ns <= first_ns)
        return max(first_ns - self.submit.arrived_ns - sum(none), 0)

    def _waited(self, now_ns: int) -> list[Interval]:
        """All its waits between two lives, up to now."""
        if not self.lost_ns:
            return list(self.waited)
        return [*self.waited, Interval(kind="replay", start_ns=self.lost_ns, end_ns=now_ns)]


def num_prompt_tokens(message: Submit | Embed, choice: int) -> int:
    """Known tokens of one of a request's sequences when it was sent."""
    if isinstance(message, Embed):
        return len(message.texts[choice])
    return sum(len(segment.token_ids) for segment in message.prompt)


def some_texts(message: Embed, places: list[int]) -> Embed:
    """A request of only these of its texts."""
    seconds = message.second_starts
    return dataclasses.replace(
        message,
        sequence_ids=[message.sequence_ids[place] for place in places],
        texts=[message.texts[place] for place in places],
        second_starts=[seconds[place] for place in places] if seconds else [],
    )


def request_keys() -> Callable[[], str]:
    """Gives request keys that no other client's are equal to: 64 bits from a random place on."""
    numbers = itertools.count(int.from_bytes(os.urandom(8)))

    def next_key() -> str:
        return f"{next(numbers) % (2**64 - 1) + 1:016x}"  # never 0, which means none

    return next_key
