"""The engine's end of the road to its clients: the interface, and what piles up for a slow one.

Invariant: nothing here blocks the step loop and nothing is dropped. What cannot be sent yet waits
in the client's `Backlog`, where token events of later steps are merged into one message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Protocol

from jaxserve.protocol.messages import ClientMessage, EngineMessage, TokenEvents
from jaxserve.protocol.status import StepStats

#: A client's name and its message; (None, None) only wakes the engine.
Arrival = tuple[Hashable, ClientMessage] | tuple[None, None]

#: Step statistics kept for a client that does not read.
MAX_STATS = 4096


class ServerTransport(Protocol):
    """Receives from and sends to clients, by name (`protocol.thread`, `protocol.zmq`)."""

    def receive(self, timeout_s: float) -> list[Arrival]:
        """What has come, waiting at most `timeout_s` for the first.

        A client that vanished without a word is reported as having said `Goodbye`.
        """
        ...

    def send(self, client: Hashable, message: EngineMessage) -> None:
        """Sends, or keeps until the client reads; never blocks, never raises for a lost client."""
        ...

    def close(self) -> None:
        """Sends what can be sent within a moment and lets go of the road."""
        ...


class Backlog:
    """What one client is too slow to take: its tokens in one message, and the rest behind them.

    A newer status or progress replaces an older one; of step statistics, which are for metrics
    only, the latest `MAX_STATS` are kept.
    """

    __slots__ = ("_latest", "_stats", "_tokens")

    def __init__(self) -> None:
        self._tokens: TokenEvents | None = None
        self._latest: dict[type, EngineMessage] = {}
        self._stats: deque[StepStats] = deque(maxlen=MAX_STATS)

    def __bool__(self) -> bool:
        return bool(self._tokens or self._latest or self._stats)

    def add(self, message: EngineMessage) -> None:
        """Keeps a message; merges token events with those that wait already."""
        if isinstance(message, TokenEvents):
            if self._tokens is None:
                self._tokens = message
            else:
                merge(self._tokens, message)
        elif isinstance(message, StepStats):
            self._stats.append(message)
        else:
            self._latest[type(message)] = message

    def pop(self) -> EngineMessage:
        """Takes the message to send next; `push_back` if it cannot be sent."""
        if self._tokens is not None:
            message, self._tokens = self._tokens, None
            return message
        if self._latest:
            return self._latest.pop(next(iter(self._latest)))
        return self._stats.popleft()

    def push_back(self, message: EngineMessage) -> None:
        """Puts back what `pop` gave and could not be sent."""
        if isinstance(message, StepStats):
            self._stats.appendleft(message)
        elif isinstance(message, TokenEvents):
            self._tokens = message
        else:
            self._latest.setdefault(type(message), message)


def merge(older: TokenEvents, newer: TokenEvents) -> None:
    """Adds a later step's events to an earlier one's, as if one step had brought both."""
    place = {sequence_id: index for index, sequence_id in enumerate(older.sequence_ids)}
    for sequence_id, token_ids in zip(newer.sequence_ids, newer.token_ids, strict=True):
        if sequence_id in place:
            index = place[sequence_id]
            older.token_ids[index] = older.token_ids[index] + token_ids
        else:
            older.sequence_ids.append(sequence_id)
            older.token_ids.append(token_ids)
    for into, more in (
        (older.logprobs, newer.logprobs),
        (older.prompt_logprobs, newer.prompt_logprobs),
    ):
        for sequence_id, entries in more.items():
            into[sequence_id] = into.get(sequence_id, []) + entries
    older.finished += newer.finished
    older.step_id, older.at_ns = newer.step_id, newer.at_ns
