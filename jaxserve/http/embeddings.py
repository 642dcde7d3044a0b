"""/v1/embeddings: OpenAI's, with the parameters of vLLM, Cohere and Jina that change the vector."""

from __future__ import annotations

import base64
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
    encode_texts,
    read_pooling,
)
from jaxserve.http.wire import cost_fields, encode
from jaxserve.text.embedding import Tokens
from jaxserve.text.fields import Fields
from jaxserve.types import EmbeddingInfo, EmbeddingParams

FORMATS = ("float", "base64")
#: Words of `input_type`, and whether they mean the query's side of a search.
INPUT_TYPES = {
    "query": True,
    "search_query": True,
    "document": False,
    "search_document": False,
    "passage": False,
}


async def read_embeddings(
    fields: Fields, frontend: Frontend, model: EmbeddingInfo, identity: Identity
) -> TextWork:
    """A validated request for embeddings.

    Raises:
        InvalidRequest, ContextTooLong, Forbidden: what is wrong, by field, value and limit.
    """
    if model.scores_pairs:
        raise InvalidRequest(
            f"{model.name!r} is a cross-encoder: it gives scores of pairs (/v1/score, /v1/rerank) "
            "and no embeddings",
            param="model",
        )
    config = frontend.embeddings_config
    values = fields.texts_or_tokens("input", model.vocab_size, config.max_inputs, "texts")
    form = fields.text("encoding_format", "float")
    if form not in FORMATS:
        raise fields.wrong("encoding_format", f"one of {', '.join(FORMATS)}", form)
    params = EmbeddingParams(
        pooling=read_pooling(fields, model),
        normalize=fields.flag("normalize", model.normalize),
        dimensions=fields.integer("dimensions", 0, 1, model.dimensions),
    )
    prefix = _prefix(fields, frontend, has_tokens=type(values[0]) is list)
    cut = Cut(fields, model, config.over_length)
    priority = read_priority(fields, identity)
    fields.text("user")
    fields.neutral("add_special_tokens", True)
    fields.finish()
    if type(values[0]) is str:
        texts = await encode_texts(frontend, [prefix + text for text in values], cut.limit)
    else:
        texts = [Tokens(ids[: cut.limit], len(ids)) for ids in values]
    cut.check(texts, "input")

    def answer(vectors: Float32[np.ndarray, "R D"], usage: Usage) -> bytes:
        return _document(model.name, vectors, form, usage)

    return TextWork(texts=texts, params=params, priority=priority, answer=answer)


def _prefix(fields: Fields, frontend: Frontend, *, has_tokens: bool) -> str:
    """What goes before each text: one of the model's prompts, or the request's own words."""
    text = embedding_text(frontend)
    instruction = fields.text("instruction")
    prompt_name, input_type = fields.text("prompt_name"), fields.text("input_type")
    given = {
        "instruction": instruction,
        "prompt_name": prompt_name,
        "input_type": input_type,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidRequest(
            f"{' and '.join(named)} each say what goes before the texts: send one", param=named[1]
        )
    if input_type is not None and input_type not in INPUT_TYPES:
        raise fields.wrong("input_type", f"one of {', '.join(INPUT_TYPES)}", input_type)
    if has_tokens:
        if named:
            raise InvalidRequest(
                f"{named[0]} puts words before texts, and input has token ids: put theirs there",
                param=named[0],
            )
        return ""
    if instruction is not None:
        return instruction
    if input_type is not None:
        return text.side_prefix(is_query=INPUT_TYPES[input_type])
    return text.prefix(prompt_name)


def _document(model: str, vectors: Float32[np.ndarray, "R D"], form: str, usage: Usage) -> bytes:
    little = np.ascontiguousarray(vectors, "<f4")
    written: list[Any] = (
        [base64.b64encode(row.tobytes()).decode("ascii") for row in little]
        if form == "base64"
        else little.tolist()
    )
    return encode(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(written)
            ],
            "model": model,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "total_tokens": usage.prompt_tokens,
                **cost_fields(usage),
            },
        }
    )


EMBEDDINGS = TextKind(read_embeddings, text_demand("input"))
