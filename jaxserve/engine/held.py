"""Requests that wait as messages, before the scheduler has seen them.

`Probation` holds those that may be dangerous, `RequestAdapters` those whose adapter is loaded,
`Grammars` those whose grammar is being compiled. A client may withdraw what waits here: it ends
without having run. How long it waited is noted in the message (`waited`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import cast

from jaxserve.protocol.messages import Embed, Finished, Interval, SequenceRecord, Submit
from jaxserve.protocol.replay import num_prompt_tokens, some_texts
from jaxserve.types import FinishReason


class HeldRequests[Request: Submit | Embed]:
    """Clients and their requests, in the order of their coming.

    Args:
        kind: of the wait, as `Interval` has it.
        clock_ns: CLOCK_MONOTONIC.
    """

    def __init__(self, kind: str, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._kind = kind
        self._clock_ns = clock_ns
        self._held: deque[tuple[Hashable, Request, int]] = deque()

    def __iter__(self) -> Iterator[tuple[Hashable, Request]]:
        return ((client, message) for client, message, _ in self._held)

    @property
    def num_sequences(self) -> int:
        """Sequences that wait here."""
        return sum(len(message.sequence_ids) for _, message, _ in self._held)

    def has_any(self, request_keys: Collection[str]) -> bool:
        """Whether one of these requests waits here."""
        return any(message.request_key in request_keys for _, message, _ in self._held)

    def add(self, client: Hashable, message: Request) -> None:
        """A request waits."""
        self._held.append((client, message, self._clock_ns()))

    def take(self, wanted: Callable[[Request], bool]) -> list[tuple[Hashable, Request]]:
        """Takes out those that are wanted, in their order."""
        taken = [held for held in self._held if wanted(held[1])]
        if not taken:
            return []
        self._held = deque(held for held in self._held if not wanted(held[1]))
        for _, message, since_ns in taken:
            message.waited.append(self._wait(since_ns))
        return [(client, message) for client, message, _ in taken]

    def withdraw(
        self, client: Hashable, sequence_ids: Collection[int], reason: FinishReason
    ) -> list[tuple[Request, Finished]]:
        """A client cancels these: those of them that wait here, and their ends."""
        withdrawn: list[tuple[Request, Finished]] = []
        kept: deque[tuple[Hashable, Request, int]] = deque()
        for name, message, since_ns in self._held:
            ids = set(message.sequence_ids).intersection(sequence_ids) if name == client else set()
            if ids:
                wait = self._wait(since_ns)
                withdrawn += [
                    (message, _end(message, sequence_id, reason, wait)) for sequence_id in ids
                ]
                if len(ids) == len(message.sequence_ids):
                    continue
                message = _without(message, ids)
            kept.append((name, message, since_ns))
        self._held = kept
        return withdrawn

    def forget(self, client: Hashable) -> list[Request]:
        """A client is gone: what of its waited here."""
        gone = [message for name, message, _ in self._held if name == client]
        self._held = deque(held for held in self._held if held[0] != client)
        return gone

    def _wait(self, since_ns: int) -> Interval:
        return Interval(kind=self._kind, start_ns=since_ns, end_ns=self._clock_ns())


def _end(
    message: Submit | Embed, sequence_id: int, reason: FinishReason, wait: Interval
) -> Finished:
    """The end of a sequence that this engine did not begin."""
    place = message.sequence_ids.index(sequence_id)
    prompt_tokens = num_prompt_tokens(message, place)
    emitted = message.emitted if isinstance(message, Submit) else []
    num_emitted = len(emitted[place]) if emitted else 0
    record = SequenceRecord(
        prompt_tokens=prompt_tokens,
        output_tokens=num_emitted,
        computed_tokens=prompt_tokens + num_emitted - 1 if num_emitted else 0,
        context_tokens=prompt_tokens + num_emitted,
        arrived_ns=message.arrived_ns,
        done_ns=wait.end_ns,
        intervals=[*message.waited, wait],
        traceparent=message.traceparent,
        pid=os.getpid(),
    )
    return Finished(sequence_id=sequence_id, reason=reason, record=record)


def _without[Request: Submit | Embed](message: Request, sequence_ids: Collection[int]) -> Request:
    """A request less some of its sequences."""
    kept = [i for i, number in enumerate(message.sequence_ids) if number not in sequence_ids]
    if isinstance(message, Embed):
        return cast(Request, some_texts(message, kept))
    choices = message.choices or list(range(len(message.sequence_ids)))
    emitted = message.emitted or [[]] * len(message.sequence_ids)
    return dataclasses.replace(
        message,
        sequence_ids=[message.sequence_ids[i] for i in kept],
        attempt=max(message.attempt, 1),
        choices=[choices[i] for i in kept],
        emitted=[emitted[i] for i in kept],
    )
