"""/v1/score and /v1/rerank: how well texts fit each other.

Where the model is a cross-encoder each pair is run together, and the score is the sigmoid of its
one label. Else it is a bi-encoder: every text is embedded once, and the score is the cosine.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxserve.errors import InvalidRequest
from jaxserve.http.auth import Identity
from jaxserve.http.demand import text_demand
from jaxserve.http.frontend import Frontend
from jaxserve.http.generation import Usage
from jaxserve.http.sampling import read_priority
from jaxserve.http.texts import (
    Cut,
    TextKind,
    TextWork,
    embedding_text,
    encode_pairs,
    encode_texts,
    read_pooling,
    sigmoid,
    text_list,
)
from jaxserve.http.wire import cost_fields, encode
from jaxserve.text.fields import Fields
from jaxserve.types import EmbeddingInfo, EmbeddingParams

#: Writes the document of the pairs' scores, in their order.
Write = Callable[[list[float], Usage], bytes]


async def read_score(
    fields: Fields, frontend: Frontend, model: EmbeddingInfo, identity: Identity
) -> TextWork:
    """A validated request for scores: of each pair, or of one text with each of several.

    Raises:
        InvalidRequest, ContextTooLong, Forbidden: what is wrong, by field, value and limit.
    """
    limit = frontend.embeddings_config.max_inputs
    firsts, seconds = text_list(fields, "text_1", limit), text_list(fields, "text_2", limit)
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise InvalidRequest(
            f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}: give one text_1 for all, "
            "or as many of each",
            param="text_2",
        )

    def write(scores: list[float], usage: Usage) -> bytes:
        return encode(
            {
                "id": f"score-{secrets.token_hex(12)}",
                "object": "list",
                "created": int(time.time()),
                "model": model.name,
                "data": [
                    {"index": index, "object": "score", "score": score}
                    for index, score in enumerate(scores)
                ],
                "usage": _usage(usage),
            }
        )

    pairs = list(zip(firsts, seconds, strict=True))
    return await _work(fields, frontend, model, identity, pairs, ("text_1", "text_2"), write)


async def read_rerank(
    fields: Fields, frontend: Frontend, model: EmbeddingInfo, identity: Identity
) -> TextWork:
    """A validated request to rank documents by how well they answer a query.

    Raises:
        InvalidRequest, ContextTooLong, Forbidden: what is wrong, by field, value and limit.
    """
    query = fields.text("query")
    if query is None:
        raise fields.wrong("query", "a string", None)
    documents = _documents(fields, frontend.embeddings_config.max_inputs)
    top_n = fields.integer("top_n", len(documents), 1, 2**31 - 1)
    with_texts = fields.flag("return_documents", True)
    fields.neutral("max_chunks_per_doc")

    def write(scores: list[float], usage: Usage) -> bytes:
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
        results: list[dict[str, Any]] = []
        for index in best:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if with_texts:
                result["document"] = {"text": documents[index]}
            results.append(result)
        return encode(
            {
                "id": f"rerank-{secrets.token_hex(12)}",
                "model": model.name,
                "results": results,
                "usage": _usage(usage),
            }
        )

    pairs = [(query, document) for document in documents]
    return await _work(fields, frontend, model, identity, pairs, ("query", "documents"), write)


def _documents(fields: Fields, limit: int) -> list[str]:
    """Texts, or objects with a `text` (Cohere's older form)."""
    value = fields.take("documents")
    if type(value) is not list or not value:
        raise fields.wrong("documents", "a list of strings", value)
    if len(value) > limit:
        raise fields.wrong("documents", f"a list of at most {limit} texts", value)
    texts: list[str] = []
    for item in value:
        text = item.get("text") if type(item) is dict else item
        if type(text) is not str:
            raise fields.wrong("documents", "made of strings, or of objects with a text", item)
        texts.append(text)
    return texts


async def _work(
    fields: Fields,
    frontend: Frontend,
    model: EmbeddingInfo,
    identity: Identity,
    pairs: list[tuple[str, str]],
    names: tuple[str, str],
    write: Write,
) -> TextWork:
    """What both routes do with their pairs.

    Args:
        names: of the fields that the two sides came in.
    """
    cut = Cut(fields, model, frontend.embeddings_config.over_length)
    priority = read_priority(fields, identity)
    fields.text("user")
    if model.scores_pairs:
        activated = fields.flag("use_activation", True)
        fields.finish()
        texts = await encode_pairs(frontend, pairs, cut.limit)
        cut.check(texts, names[1])
        params = EmbeddingParams(pooling=model.pooling, normalize=False)

        def of_labels(vectors: Float32[np.ndarray, "R 1"], usage: Usage) -> bytes:
            labels = vectors[:, 0].tolist()
            return write([sigmoid(x) for x in labels] if activated else labels, usage)

        return TextWork(texts=texts, params=params, priority=priority, answer=of_labels)
    params = EmbeddingParams(pooling=read_pooling(fields, model), normalize=True)
    fields.finish()
    half = embedding_text(frontend)
    before = half.side_prefix(is_query=True), half.side_prefix(is_query=False)
    firsts = _Distinct([before[0] + first for first, _ in pairs])
    seconds = _Distinct([before[1] + second for _, second in pairs])
    texts = await encode_texts(frontend, firsts.texts, cut.limit)
    cut.check(texts, names[0])
    documents = await encode_texts(frontend, seconds.texts, cut.limit)
    cut.check(documents, names[1])

    def of_vectors(vectors: Float32[np.ndarray, "R D"], usage: Usage) -> bytes:
        own, other = vectors[firsts.places], vectors[len(texts) :][seconds.places]
        return write(np.einsum("rd,rd->r", own, other, dtype=np.float64).tolist(), usage)

    return TextWork(texts=[*texts, *documents], params=params, priority=priority, answer=of_vectors)


class _Distinct:
    """Texts, each once, and where each of the given ones is among them."""

    def __init__(self, texts: Sequence[str]) -> None:
        numbers: dict[str, int] = {}
        self.places = [numbers.setdefault(text, len(numbers)) for text in texts]
        self.texts = list(numbers)


def _usage(usage: Usage) -> dict[str, Any]:
    tokens = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    return tokens | cost_fields(usage)


SCORE = TextKind(read_score, text_demand("text_1", "text_2"))
RERANK = TextKind(read_rerank, text_demand("query", "documents"))
