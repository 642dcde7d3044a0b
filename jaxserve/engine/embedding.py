"""Embedding, the engine's second kind of step: texts in, vectors out.

The loop gives it turns. Where something is generated too, the two kinds take turns, one step each,
and an embedding step then has fewer tokens (`embeddings.shared_embed_tokens`): that is what a
generated token may have to wait for. Texts wait in a queue of their own (`scheduler.embedding`),
and what the device made of them is cut, brought to length one and checked here.

Invariants: every text let in is finished exactly once. A number that is not finite is an error of
its own text, and never sent as a vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import numpy as np
from jaxtyping import Float32

from jaxserve.config import EmbeddingsConfig, SchedulerConfig
from jaxserve.device.embed_step import NO_SECOND, EmbedInput, EmbedOutputs
from jaxserve.engine.check import check_embed, request_number
from jaxserve.engine.parts import EmbeddingParts
from jaxserve.engine.recorder import Recorder
from jaxserve.engine.turn import TextsInFlight
from jaxserve.errors import EmbeddingNotFinite, InvalidRequest, JaxserveError, Overloaded
from jaxserve.protocol.messages import Embed
from jaxserve.scheduler.embedding import EmbeddingQueue, Text
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import POOLINGS, EmbeddingInfo, EmbeddingParams, FinishReason

#: Ends a text: with its vector, or with an error.
Finish = Callable[[Text, int, JaxserveError | None, bytes], None]
#: How much of the tokens a second that were measured stays after each further step.
_FADING = 0.9


class Embedding:
    """The texts of one engine; see the module.

    Args:
        parts: the model that embeds; None where there is none: then nothing is let in.
        config: budgets of a step; limits: of the queue.
        recorder: told what is launched.
    """

    def __init__(
        self,
        parts: EmbeddingParts | None,
        config: EmbeddingsConfig,
        limits: SchedulerConfig,
        recorder: Recorder,
    ) -> None:
        self._parts = parts
        self._config = config
        self._queue = EmbeddingQueue(limits)
        self._recorder = recorder
        self._num_in_flight = 0
        self._num_steps = 0
        self._tokens = self._ns = 0.0

    @property
    def model(self) -> EmbeddingInfo | None:
        """What the front end is told of the model."""
        return None if self._parts is None else self._parts.model

    @property
    def num_waiting(self) -> int:
        """Texts that are not launched."""
        return self._queue.num_waiting

    @property
    def num_shed(self) -> dict[str, int]:
        """See `EmbeddingQueue`."""
        return self._queue.num_shed

    @property
    def wait_s(self) -> float:
        """How long a text that comes now waits, if nobody comes before it; 0 before any was run."""
        return self._queue.num_tokens * self._ns / self._tokens / 1e9 if self._tokens else 0.0

    @property
    def rate(self) -> float:
        """Texts that are embedded in a second, of late; 0 before any was, or where none waits."""
        wait_s = self.wait_s
        return self._queue.num_waiting / wait_s if wait_s else 0.0

    def submit(self, client: Hashable, message: Embed) -> list[Text]:
        """Lets a request in.

        Raises:
            InvalidRequest: no model embeds here, or a text is out of bounds.
            Overloaded: too many wait.
        """
        if self._parts is None:
            raise InvalidRequest("no model embeds here: set embeddings.model")
        check_embed(message, self._parts.model)
        return self._queue.submit(
            [(client, sequence_id) for sequence_id in message.sequence_ids],
            message.texts,
            message.second_starts or [NO_SECOND] * len(message.texts),
            message.params,
            priority=message.priority,
            tenant=message.tenant,
            weight=message.weight,
            arrived_ns=message.arrived_ns,
            request=request_number(message.request_key),
            again=message.attempt > 0,
            queued_ns=_queued_ns(message) if message.attempt else 0,
        )

    def cancel(self, text: Sequence, reason: FinishReason) -> None:
        """Ends a text."""
        self._queue.cancel(text, reason)

    def take_shed(self) -> list[tuple[Sequence, Overloaded]]:
        """See `EmbeddingQueue`."""
        return self._queue.take_shed()

    def launch(self, *, shared: bool) -> TextsInFlight | None:
        """Launches the next step; None if no text waits.

        Args:
            shared: something is generated too.
        """
        parts = self._parts
        if parts is None or not self._queue.num_waiting:
            return None
        config = self._config
        budget = config.shared_embed_tokens if shared else config.embed_tokens
        buckets = parts.buckets
        texts = self._queue.take(buckets.room(budget).add)
        inputs = [
            EmbedInput(
                token_ids=text.token_ids,
                second_start=text.second_start,
                pooling=POOLINGS.index(text.params.pooling),
            )
            for text in texts
        ]
        program = buckets.choose([text.prompt_len for text in texts])
        self._recorder.embedding(dict.fromkeys(text.request for text in texts), program)
        self._num_steps += 1
        return TextsInFlight(self._num_steps, texts, program, parts.embedder.launch(inputs))

    def collect(self, step: TextsInFlight) -> EmbedOutputs:
        """Waits for a step."""
        assert self._parts is not None
        outputs = self._parts.embedder.collect(step.launched)
        self._tokens = _FADING * self._tokens + sum(text.prompt_len for text in step.texts)
        self._ns = _FADING * self._ns + outputs.device_ns
        return outputs

    def deliver(self, step: TextsInFlight, outputs: EmbedOutputs, now_ns: int, end: Finish) -> None:
        """Finishes the texts of a step, but those that have been cancelled meanwhile."""
        assert self._parts is not None
        raw = self._parts.model.scores_pairs
        for text, vector in zip(step.texts, self._made(step.texts, outputs, raw=raw), strict=True):
            if not self._queue.done(text):
                continue
            text.first_token_ns = now_ns
            if vector is None:
                text.reason = FinishReason.ERROR
                end(text, now_ns, _NOT_FINITE, b"")
            else:
                end(text, now_ns, None, vector)

    def count_work(self, step: TextsInFlight) -> tuple[int, int]:
        """FLOPs and bytes of a step."""
        assert self._parts is not None
        return self._parts.embedder.count_work([text.prompt_len for text in step.texts])

    def shares(self, step: TextsInFlight) -> list[float]:
        """How much of a step's work each of its texts is: by its operations, or its tokens."""
        assert self._parts is not None
        lengths = [text.prompt_len for text in step.texts]
        count = self._parts.embedder.count_work
        work = {length: count([length])[0] for length in set(lengths)}
        return [work[length] or length for length in lengths]

    def _made(self, texts: list[Text], outputs: EmbedOutputs, *, raw: bool) -> list[bytes | None]:
        """The bytes of each text's vector; None where it is none."""
        first = texts[0].params
        if raw or all(text.params == first for text in texts):  # nearly always: at once
            return as_bytes(outputs.vectors, None if raw else first)
        return [
            as_bytes(outputs.vectors[row : row + 1], text.params)[0]
            for row, text in enumerate(texts)
        ]


_NOT_FINITE = EmbeddingNotFinite(
    "the model gave no vector for a text: a number of it is not finite, or all are zero"
)


def _queued_ns(message: Embed) -> int:
    """How long texts that come again have waited while there was an engine."""
    since_ns = time.monotonic_ns() - message.arrived_ns
    return max(since_ns - sum(wait.end_ns - wait.start_ns for wait in message.waited), 0)


def as_bytes(
    vectors: Float32[np.ndarray, "R D"], params: EmbeddingParams | None
) -> list[bytes | None]:
    """Vectors cut and brought to length one as asked for; None for one that is not finite.

    Args:
        params: None leaves them as they are: scores.
    """
    if params is None:
        return [v.tobytes() if np.isfinite(v).all() else None for v in vectors]
    if params.dimensions:
        vectors = vectors[:, : params.dimensions]
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    good = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
    if params.normalize:
        vectors = np.divide(vectors, lengths, where=good[:, None], out=np.zeros(vectors.shape))
    made = np.ascontiguousarray(vectors, np.float32)
    return [row.tobytes() if fine else None for row, fine in zip(made, good, strict=True)]
