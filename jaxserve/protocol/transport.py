"""The client's end of the road to an engine, and what both kinds of client put on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from jaxserve.protocol.messages import (
    AdapterRef,
    ClientMessage,
    Embed,
    EngineMessage,
    Submit,
    TokenSegment,
    UseVocabulary,
)
from jaxserve.protocol.streams import StreamState
from jaxserve.types import EmbeddingParams, SamplingParams, Vocabulary

#: How often a client asks for the engine's status, which is also its own sign of life.
HEARTBEAT_S = 1.0
#: A client that stood still for longer may have been given up by the engine (`zmq.SILENCE_S`).
MAX_PAUSE_S = 500.0


class ClientTransport(Protocol):
    """The client's end of the road to an engine (`protocol.thread`, `protocol.zmq`)."""

    def open(self, deliver: Callable[[EngineMessage], None]) -> None:
        """Begins to receive; `deliver` may be called from another thread."""
        ...

    def send(self, message: ClientMessage) -> None:
        """Queues a message for the engine; never blocks."""
        ...

    def close(self) -> None:
        """Sends what is queued, within a moment, and lets go of the road."""
        ...

    def abandon(self) -> None:
        """Lets go of the road at once: the engine at its end has died."""
        ...


class Teller:
    """Sends a client's messages, the vocabulary before the first that an engine needs it for.

    Args:
        vocabulary: makes it; None where no request may have a grammar.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary] | None) -> None:
        self._make = vocabulary
        self._made: Vocabulary | None = None
        self._told: ClientTransport | None = None

    def send(self, transport: ClientTransport, message: ClientMessage) -> None:
        """Sends a message on the road to an engine."""
        has_grammar = isinstance(message, Submit) and message.sampling.grammar is not None
        if has_grammar and self._told is not transport and self._make is not None:
            self._made = self._made or self._make()
            self._told = transport  # each life of the engine has a road of its own
            transport.send(UseVocabulary(vocabulary=self._made))
        transport.send(message)


def embed_message(
    state: StreamState,
    texts: Sequence[Sequence[int]],
    params: EmbeddingParams,
    *,
    second_starts: Sequence[int] = (),
    priority: int = 0,
    tenant: str = "",
    weight: float = 1.0,
    arrived_ns: int | None = None,
    traceparent: str = "",
) -> Embed:
    """The message that asks for the vectors of a stream's texts."""
    return Embed(
        sequence_ids=list(state.sequence_ids),
        texts=[list(text) for text in texts],
        second_starts=list(second_starts),
        params=params,
        arrived_ns=time.monotonic_ns() if arrived_ns is None else arrived_ns,
        priority=priority,
        tenant=tenant,
        weight=weight,
        traceparent=traceparent,
    )


def submit_message(
    state: StreamState,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    priority: int = 0,
    tenant: str = "",
    cache_salt: str = "",
    weight: float = 1.0,
    arrived_ns: int | None = None,
    adapter: AdapterRef | None = None,
    traceparent: str = "",
) -> Submit:
    """The message that starts a stream's sequences."""
    return Submit(
        sequence_ids=list(state.sequence_ids),
        prompt=[TokenSegment(token_ids=list(prompt))],
        sampling=sampling,
        arrived_ns=time.monotonic_ns() if arrived_ns is None else arrived_ns,
        priority=priority,
        tenant=tenant,
        cache_salt=cache_salt,
        weight=weight,
        adapter=adapter,
        traceparent=traceparent,
    )
