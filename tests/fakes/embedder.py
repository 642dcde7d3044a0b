"""A model that embeds without a device: a vector is a hash of its text's tokens.

`vector_of` says what must come out. A text with the token NOT_FINITE has a NaN in it, one with NIL
is all zeros; a model called "pairs" scores pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.config import Config
from jaxserve.device.embed_step import NO_SECOND, EmbedBuckets, EmbedInput, EmbedOutputs
from jaxserve.engine.parts import EmbeddingParts
from jaxserve.formats.sentence_files import SentenceFiles
from jaxserve.scheduler.embedding import group_size
from jaxserve.text.embedding import EmbeddingText, Tokens
from jaxserve.types import POOLINGS, EmbeddingInfo

DIMENSIONS = 8
MAX_LENGTH = 64
VOCAB_SIZE = 300
NOT_FINITE, NIL = 290, 291


def raw_vector(tokens: Sequence[int], pooling: str = "mean", second_start: int = NO_SECOND):
    """What the device gives for a text."""
    seed = [POOLINGS.index(pooling), min(second_start, 10**6), *tokens]
    vector = np.random.default_rng(seed).normal(size=DIMENSIONS).astype(np.float32)
    if NOT_FINITE in tokens:
        vector[3] = np.nan
    return vector * 0 if NIL in tokens else vector


def vector_of(
    tokens: Sequence[int],
    pooling: str = "mean",
    dimensions: int = DIMENSIONS,
    *,
    normalize: bool = True,
):
    """What a client must get for a text."""
    vector = raw_vector(tokens, pooling)[:dimensions]
    return vector / np.linalg.norm(vector) if normalize else vector


def label_of(tokens: Sequence[int], second_start: int) -> float:
    """What a client of the model "pairs" must get for a pair, before the sigmoid."""
    return float(raw_vector(tokens, "cls", second_start)[0])


class FakeEmbedder:
    """Runs steps on the host.

    Attributes:
        steps: the texts of each step so far.
        fail_at: step number at which `launch` raises, if set.
    """

    def __init__(self, *, scores_pairs: bool = False) -> None:
        self.steps: list[list[list[int]]] = []
        self.fail_at: int | None = None
        self._width = 1 if scores_pairs else DIMENSIONS

    def warm_up(self, progress: Callable[[str, int, int], None], threads: int = 0) -> None:
        """Nothing is compiled."""

    def launch(self, texts: Sequence[EmbedInput]) -> np.ndarray:
        """Runs it at once; the results wait for `collect`."""
        if self.fail_at == len(self.steps):
            raise RuntimeError("the fake embedder was told to fail")
        self.steps.append([text.token_ids for text in texts])
        return np.stack(
            [
                raw_vector(text.token_ids, POOLINGS[text.pooling], text.second_start)[: self._width]
                for text in texts
            ]
        )

    def collect(self, launched: np.ndarray) -> EmbedOutputs:
        """The results of a launched step."""
        return EmbedOutputs(vectors=launched, device_ns=1_000_000)

    def count_work(self, lengths: Sequence[int]) -> tuple[int, int]:
        """No FLOPs, no bytes."""
        return 0, 0


def fake_embedding(config: Config) -> EmbeddingParts:
    """A loaded fake, whatever `embeddings.model` says."""
    scores_pairs = config.embeddings.model == "pairs"
    max_length = config.embeddings.max_length or MAX_LENGTH
    return EmbeddingParts(
        model=EmbeddingInfo(
            name=config.embeddings.name or "fake-embedder",
            max_length=max_length,
            vocab_size=VOCAB_SIZE,
            dimensions=1 if scores_pairs else DIMENSIONS,
            pooling="cls" if scores_pairs else "mean",
            normalize=True,
            scores_pairs=scores_pairs,
            group=group_size(config.scheduler),
        ),
        embedder=FakeEmbedder(scores_pairs=scores_pairs),
        buckets=EmbedBuckets(max_length, config.embeddings.embed_tokens, in_grid=False),
    )


class ByteTexts:
    """An `EmbeddingTokenizer`: one token a byte; a pair has token 256 between its texts."""

    def encode(self, texts: Sequence[str], limit: int | None) -> list[Tokens]:
        """See `EmbeddingTokenizer`."""
        encoded = [list(text.encode()) for text in texts]
        return [Tokens(ids[:limit], len(ids)) for ids in encoded]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], limit: int | None) -> list[Tokens]:
        """See `EmbeddingTokenizer`."""
        found = []
        for first, second in pairs:
            ids = [*first.encode(), 256, *second.encode()]
            found.append(Tokens(ids[:limit], len(ids), len(first.encode()) + 1))
        return found


def fake_text() -> EmbeddingText:
    """The text half, with two prompts."""
    return EmbeddingText(ByteTexts(), SentenceFiles(prompts={"query": "q: ", "passage": "p: "}))
