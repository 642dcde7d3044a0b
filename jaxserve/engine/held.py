"""Requests that wait before the scheduler sees them, as the messages that they came as."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator

from jaxserve.protocol.messages import Finished, SequenceRecord, Submit
from jaxserve.types import FinishReason

#: Whose it is, and what it asks for.
Held = tuple[Hashable, Submit]


class HeldRequests:
    """In the order of their coming."""

    def __init__(self) -> None:
        self._held: deque[Held] = deque()

    @property
    def num_sequences(self) -> int:
        """That wait here."""
        return sum(len(message.sequence_ids) for _, message in self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(self._held)

    def add(self, client: Hashable, message: Submit) -> None:
        """One more."""
        self._held.append((client, message))

    def take(self, wanted: Callable[[Submit], bool]) -> list[Held]:
        """Takes some out, in the order of their coming."""
        if not self._held:
            return []
        taken = [held for held in self._held if wanted(held[1])]
        self._held = deque(held for held in self._held if not wanted(held[1]))
        return taken

    def withdraw(
        self, client: Hashable, sequence_ids: Collection[int], reason: FinishReason
    ) -> list[tuple[Submit, Finished]]:
        """A client cancels these: the ends of those of them that wait here."""
        withdrawn: list[tuple[Submit, Finished]] = []
        kept: deque[Held] = deque()
        for name, message in self._held:
            ids = set(message.sequence_ids).intersection(sequence_ids) if name == client else set()
            if ids:
                withdrawn += [(message, _end(message, number, reason)) for number in ids]
                if len(ids) == len(message.sequence_ids):
                    continue
                message = _without(message, ids)
            kept.append((name, message))
        self._held = kept
        return withdrawn

    def forget(self, client: Hashable) -> list[Submit]:
        """A client is gone: what of its waited here."""
        gone = [message for name, message in self._held if name == client]
        self._held = deque(held for held in self._held if held[0] != client)
        return gone


def _end(message: Submit, sequence_id: int, reason: FinishReason) -> Finished:
    """The end of a sequence that this engine did not begin."""
    prompt_tokens = sum(len(segment.token_ids) for segment in message.prompt)
    place = message.sequence_ids.index(sequence_id)
    num_emitted = len(message.emitted[place]) if message.emitted else 0
    record = SequenceRecord(
        prompt_tokens=prompt_tokens,
        output_tokens=num_emitted,
        computed_tokens=prompt_tokens + num_emitted - 1 if num_emitted else 0,
        context_tokens=prompt_tokens + num_emitted,
        arrived_ns=message.arrived_ns,
        done_ns=time.monotonic_ns(),
    )
    return Finished(sequence_id=sequence_id, reason=reason, record=record)


def _without(message: Submit, sequence_ids: Collection[int]) -> Submit:
    """A request less some of its sequences."""
    kept = [i for i, number in enumerate(message.sequence_ids) if number not in sequence_ids]
    choices = message.choices or list(range(len(message.sequence_ids)))
    emitted = message.emitted or [[]] * len(message.sequence_ids)
    return dataclasses.replace(
        message,
        sequence_ids=[message.sequence_ids[i] for i in kept],
        attempt=max(message.attempt, 1),
        choices=[choices[i] for i in kept],
        emitted=[emitted[i] for i in kept],
    )
