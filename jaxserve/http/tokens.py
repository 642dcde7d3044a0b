"""/tokenize and /detokenize: the model's tokenizer over HTTP.

They take no tokens of the engine's, but time of an HTTP process: so they count as requests in the
rate limits, before any of their work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from jaxserve.http.body import num_bytes
from jaxserve.http.chat import read_messages
from jaxserve.http.errors import send_json
from jaxserve.http.frontend import Frontend
from jaxserve.text.fields import Fields
from jaxserve.text.tools.asked import read_toolbox
from jaxserve.types import ModelInfo

#: Answers one request with a document.
Answer = Callable[[Frontend, Fields, ModelInfo], Awaitable[dict[str, Any]]]


class TokensEndpoint:
    """ASGI: one of the two routes."""

    def __init__(self, frontend: Frontend, answer: Answer) -> None:
        self._frontend = frontend
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request, once the limits let it in."""
        frontend = self._frontend
        model = frontend.model()
        fields = await frontend.read(scope, receive)
        frontend.adapters.pick(fields, model)
        async with frontend.gate.counted(scope, fields, scope["jaxserve.identity"]):
            fields.text("user")
            await send_json(send, await self._answer(frontend, fields, model))


async def tokenize(frontend: Frontend, fields: Fields, model: ModelInfo) -> dict[str, Any]:
    """/tokenize: a `prompt`, or `messages` through the chat template, as token ids."""
    with_strings = fields.flag("return_token_strs", False)
    if fields.take("messages") is not None:
        toolbox = read_toolbox(fields, num_bytes=num_bytes(fields, "tools"))
        render = read_messages(fields, frontend, toolbox)
        fields.finish()
        _, ids = await render()
    else:
        text, add_special_tokens = _prompt(fields)
        ids = await frontend.encode(text, add_special_tokens=add_special_tokens)
    document: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": model.max_context,
        "tokens": ids,
    }
    if with_strings:
        document["token_strs"] = [frontend.tokenizer.token_text(token) for token in ids]
    return document


async def detokenize(frontend: Frontend, fields: Fields, model: ModelInfo) -> dict[str, Any]:
    """/detokenize: token ids as text, special tokens included."""
    ids = fields.token_ids("tokens", model.vocab_size, frontend.config.max_body_bytes)
    if ids is None:
        raise fields.wrong("tokens", "a list of token ids", None)
    fields.finish()
    text = await asyncio.to_thread(frontend.tokenizer.decode, list(ids), skip_special_tokens=False)
    return {"prompt": text}


def _prompt(fields: Fields) -> tuple[str, bool]:
    text = fields.text("prompt")
    if text is None:
        raise fields.wrong("prompt", "a string (or send messages)", None)
    add_special_tokens = fields.flag("add_special_tokens", True)
    fields.finish()
    return text, add_special_tokens
