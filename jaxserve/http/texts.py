"""The one endpoint behind embeddings, scores and reranking: texts in, a vector of each out.

A kind says which fields a body has and how the answer looks (`http.embeddings`, `http.score`); from
there on all take this path. Texts go to the engine in groups, so that a large request neither fills
the queue nor holds back others of equal rank.

Invariants: every text gets its vector, or the whole request its error. Whoever leaves early cancels
what still waits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxserve.errors import (
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    JaxserveError,
    ModelNotFound,
    Overloaded,
)
from jaxserve.http.auth import Identity
from jaxserve.http.demand import ReadDemand
from jaxserve.http.errors import send_json
from jaxserve.http.frontend import INLINE_CHARACTERS, Frontend
from jaxserve.http.generation import Usage
from jaxserve.http.records import note_admitted, note_read, record_of
from jaxserve.http.sse import Departure
from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.protocol.stream import Stream
from jaxserve.text.embedding import EmbeddingText, Tokens, groups_of
from jaxserve.text.fields import Fields, show
from jaxserve.types import POOLINGS, EmbeddingInfo, EmbeddingParams, FinishReason

#: Groups of a request's texts that are at the engine at once.
NUM_GROUPS = 2


@dataclass(slots=True, kw_only=True)
class TextWork:
    """A validated request.

    Attributes:
        texts: to be embedded, or pairs to be scored.
        answer: makes the document of their vectors, which are in the same order.
    """

    texts: list[Tokens]
    params: EmbeddingParams
    priority: int
    answer: Callable[[Float32[np.ndarray, "R D"], Usage], bytes]


@dataclass(frozen=True, slots=True)
class TextKind:
    """What one route does.

    Attributes:
        read: takes the body's fields apart.
        demand: what it will cost, before that.
    """

    read: Callable[[Fields, Frontend, EmbeddingInfo, Identity], Awaitable[TextWork]]
    demand: ReadDemand


class TextsEndpoint:
    """ASGI: one of the routes over texts."""

    def __init__(self, frontend: Frontend, kind: TextKind) -> None:
        self._frontend = frontend
        self._kind = kind

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request; raises what the error table answers."""
        frontend = self._frontend
        model = frontend.embedding_model()
        identity: Identity = scope["jaxserve.identity"]
        frontend.costs.admit(scope, identity)
        frontend.gate.glance(scope, identity, generates=False)
        fields = await frontend.read(scope, receive)
        frontend.costs.read(scope, fields)
        _check_model(fields, model)
        record = record_of(scope)
        note_read(record, model.name, "")
        visit = await frontend.gate.enter(scope, fields, identity, self._kind.demand)
        try:
            frontend.reporter.begun(note_admitted(record, visit.demand))
            work = await self._kind.read(fields, frontend, model, identity)
            usage = Usage(prompt_tokens=sum(len(text.ids) for text in work.texts))
            await visit.begin_texts(usage.prompt_tokens)
            visit.follow(usage)
            record.tokenized_ns = record.submitted_ns = time.monotonic_ns()
            record.prompt_tokens, record.texts = usage.prompt_tokens, len(work.texts)
            run = TextRun(frontend, model, work, identity, record, scope["jaxserve.streams"])
            departure = Departure(receive, run.cancel)
            try:
                async with departure:
                    vectors = await run.vectors(visit.deadline_ns)
                    frontend.metrics.texts(len(work.texts), usage.prompt_tokens)
                    frontend.costs.tell(scope, usage)
                    await send_json(send, work.answer(vectors, usage))
            except JaxserveError:
                if not departure.gone:
                    raise
                record.outcome = Outcome.LEFT
                return
            finally:
                run.cancel()
            done_ns = time.monotonic_ns() - record.arrived_ns
            frontend.metrics.request_done(done_ns / 1e9)
        except Overloaded:
            visit.forgive()
            raise
        finally:
            visit.leave()


class TextRun:
    """The texts of one request on their way through the engine.

    Args:
        streams: gets all that are opened.
    """

    def __init__(
        self,
        frontend: Frontend,
        model: EmbeddingInfo,
        work: TextWork,
        identity: Identity,
        record: RequestRecord,
        streams: list[Stream],
    ) -> None:
        self._client = frontend.client
        self._group = model.group
        self._work = work
        self._identity = identity
        self._record = record
        self._streams: set[Stream] = set()
        self._all_streams = streams
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody wants the vectors any more."""
        self._cancelled = True
        for stream in self._streams:
            stream.cancel()

    async def vectors(self, deadline_ns: int | None) -> Float32[np.ndarray, "R D"]:
        """The vectors, in the texts' order.

        Raises:
            DeadlineExceeded: the deadline has passed; the engine has been told.
            JaxserveError: the engine refused a text, or failed.
        """
        left_s = None
        if deadline_ns is not None:
            left_s = max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        try:
            async with asyncio.timeout(left_s):
                return await self._run()
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before it was done") from None

    async def _run(self) -> Float32[np.ndarray, "R D"]:
        texts = self._work.texts
        groups = groups_of(texts, self._group)
        running: deque[tuple[Stream, list[int]]] = deque()
        found: list[bytes] = [b""] * len(texts)
        while groups or running:
            while groups and len(running) < NUM_GROUPS:
                group = groups.popleft()
                running.append((self._submit(group), group))
            stream, group = running.popleft()
            async for event in stream:
                if event.finished is not None:
                    if event.finished.reason is FinishReason.CANCELLED:
                        raise Overloaded("the request was cancelled before it was done")
                    found[group[event.choice]] = event.finished.vector
            self._streams.discard(stream)
        return np.frombuffer(b"".join(found), np.float32).reshape(len(texts), -1)

    def _submit(self, group: list[int]) -> Stream:
        if self._cancelled:
            raise Overloaded("the request was cancelled before it was done")
        texts = [self._work.texts[index] for index in group]
        seconds = [text.second_start for text in texts]
        stream = self._client.embed(
            [text.ids for text in texts],
            self._work.params,
            second_starts=[start for start in seconds if start is not None],
            priority=self._work.priority,
            tenant=self._identity.tenant,
            weight=self._identity.weight,
            arrived_ns=self._record.arrived_ns,
            traceparent=self._record.traceparent,
        )
        self._streams.add(stream)
        self._all_streams.append(stream)
        return stream


# ---------------------------------------------------------------------------- what kinds share


def _check_model(fields: Fields, model: EmbeddingInfo) -> None:
    name = fields.text("model")
    if name is not None and name != model.name:
        raise ModelNotFound(
            f"model {show(name)} does not embed here; {model.name!r} does", param="model"
        )


def read_pooling(fields: Fields, model: EmbeddingInfo) -> str:
    """How the states of a text become one vector."""
    pooling = fields.text("pooling", model.pooling)
    if pooling not in POOLINGS:
        raise fields.wrong("pooling", f"one of {', '.join(POOLINGS)}", pooling)
    return pooling


class Cut:
    """What is done with texts that are too long: an error, or the tokens up to a limit."""

    def __init__(self, fields: Fields, model: EmbeddingInfo, over_length: str) -> None:
        """Reads `truncate_prompt_tokens` (vLLM's) and `truncate` (Cohere's and Jina's)."""
        self.model = model
        truncates = over_length == "truncate"
        value = fields.take("truncate")
        words = {"NONE": False, "END": True}
        if type(value) is str:
            value = words.get(value.upper(), value)
        if value is not None:
            if type(value) is not bool:
                raise fields.wrong("truncate", 'true or false, or "END" or "NONE"', value)
            truncates = value
        limit = fields.integer("truncate_prompt_tokens", None, -1, model.max_length)
        if limit == 0:
            raise fields.wrong("truncate_prompt_tokens", "above 0, or -1 for the model's limit", 0)
        if limit is None and truncates:
            limit = model.max_length
        #: Tokens to keep; None where a longer text is an error.
        self.limit: int | None = model.max_length if limit == -1 else limit

    def check(self, texts: Sequence[Tokens], param: str) -> None:
        """Refuses texts that are empty, or too long."""
        for text in texts:
            if not text.ids:
                raise InvalidRequest(f"{param} has an empty text; it needs a token", param=param)
            if len(text.ids) > self.model.max_length:
                raise ContextTooLong(
                    f"a text of {param} has {len(text.ids)} tokens, the model takes "
                    f"{self.model.max_length}; shorten it, or send truncate: true",
                    param=param,
                )


def embedding_text(frontend: Frontend) -> EmbeddingText:
    """The text half, which there is."""
    assert frontend.embeddings is not None, "embedding_model() was asked"
    return frontend.embeddings


async def encode_texts(frontend: Frontend, texts: Sequence[str], limit: int | None) -> list[Tokens]:
    """Texts as token ids; in a thread where they are long."""
    encode = embedding_text(frontend).tokenizer.encode
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return encode(texts, limit)
    return await asyncio.to_thread(encode, texts, limit)


async def encode_pairs(
    frontend: Frontend, pairs: Sequence[tuple[str, str]], limit: int | None
) -> list[Tokens]:
    """Pairs of texts as token ids; in a thread where they are long."""
    encode = embedding_text(frontend).tokenizer.encode_pairs
    if sum(len(first) + len(second) for first, second in pairs) <= INLINE_CHARACTERS:
        return encode(pairs, limit)
    return await asyncio.to_thread(encode, pairs, limit)


def text_list(fields: Fields, name: str, limit: int) -> list[str]:
    """One text or several, of a field."""
    value = fields.take(name)
    values = [value] if type(value) is str else value
    if type(values) is not list or not values:
        raise fields.wrong(name, "a string or a list of strings", value)
    if len(values) > limit:
        raise fields.wrong(name, f"a list of at most {limit} texts", value)
    for item in values:
        if type(item) is not str:
            raise fields.wrong(name, "made of strings", item)
    return values


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), also far from 0."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
