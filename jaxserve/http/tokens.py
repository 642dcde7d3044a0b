"""/tokenize and /detokenize: the model's tokenizer over HTTP.

They take no tokens of the engine's, but time of an HTTP process: so they count as requests in the
rate limits, before any of their work.
"""

from __future__ import annotations

import asyncio
from typing import Any

from jaxserve.http.body import Fields
from jaxserve.http.chat import read_messages
from jaxserve.http.errors import send_json
from jaxserve.http.frontend import Frontend
from jaxserve.http.tools import read_toolbox
from jaxserve.types import ModelInfo


class Tokenize:
    """/tokenize: a `prompt`, or `messages` through the chat template, as token ids."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers with the ids, their number and the context's length."""
        frontend = self._frontend
        model = frontend.model()
        fields = await frontend.read(scope, receive)
        frontend.adapters.pick(fields, model)
        async with frontend.gate.counted(scope, fields, scope["jaxserve.identity"]):
            await self._answer(fields, model, send)

    async def _answer(self, fields: Fields, model: ModelInfo, send: Any) -> None:
        frontend = self._frontend
        fields.text("user")
        with_strings = fields.flag("return_token_strs", False)
        if fields.take("messages") is not None:
            render = read_messages(fields, frontend, read_toolbox(fields))
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
        await send_json(send, document)


class Detokenize:
    """/detokenize: token ids as text."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers with the text, special tokens included."""
        frontend = self._frontend
        model = frontend.model()
        fields = await frontend.read(scope, receive)
        frontend.adapters.pick(fields, model)
        async with frontend.gate.counted(scope, fields, scope["jaxserve.identity"]):
            await self._answer(fields, model, send)

    async def _answer(self, fields: Fields, model: ModelInfo, send: Any) -> None:
        frontend = self._frontend
        fields.text("user")
        limit = frontend.config.max_body_bytes
        ids = fields.token_ids("tokens", model.vocab_size, limit)
        if ids is None:
            raise fields.wrong("tokens", "a list of token ids", None)
        fields.finish()
        text = await asyncio.to_thread(
            frontend.tokenizer.decode, list(ids), skip_special_tokens=False
        )
        await send_json(send, {"prompt": text})


def _prompt(fields: Fields) -> tuple[str, bool]:
    text = fields.text("prompt")
    if text is None:
        raise fields.wrong("prompt", "a string (or send messages)", None)
    add_special_tokens = fields.flag("add_special_tokens", True)
    fields.finish()
    return text, add_special_tokens
