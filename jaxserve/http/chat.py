"""/v1/chat/completions: messages in through the chat template, an assistant's message out."""

from __future__ import annotations

from typing import Any

from jaxserve import types
from jaxserve.errors import InvalidRequest
from jaxserve.http.auth import Identity
from jaxserve.http.body import Fields
from jaxserve.http.frontend import Frontend
from jaxserve.http.generation import Delta, Usage
from jaxserve.http.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.http.sampling import (
    Options,
    plan_outputs,
    read_options,
    refuse_unsupported,
    with_candidates_ranked,
)
from jaxserve.http.wire import Answer, Head, Work, encode, usage_fields
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ModelInfo

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 10_000

#: Names that `chat_template_kwargs` may not take: the template's own arguments.
_RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt", "conversation"})


async def read_chat(
    fields: Fields, frontend: Frontend, model: ModelInfo, identity: Identity
) -> Work:
    """A validated chat request.

    Raises:
        InvalidRequest, ContextTooLong, Forbidden: what is wrong, by field, value and limit.
    """
    render = read_messages(fields, frontend)
    options = read_options(fields, model, frontend.tokenizer, identity, frontend.config.max_choices)
    _read_max_tokens(fields, options)
    num_top = _num_top(fields, options)
    _refuse_unsupported(fields)
    refuse_unsupported(fields)
    fields.finish()
    prompt = await render()
    await frontend.check_grammar(options.wanted, model)
    with_candidates_ranked(options)
    samplings = plan_outputs(
        options, [len(prompt)], None, model, frontend.positions_in_cache(), prompt_field="messages"
    )
    wire = ChatWire(model.name, frontend.tokenizer, options, num_top, prompt)
    return Work(prompts=[prompt], samplings=samplings, options=options, wire=wire)


def read_messages(fields: Fields, frontend: Frontend) -> Any:
    """Reads the messages and what shapes their rendering.

    Returns:
        An async function that renders and tokenizes them: called once all else has been checked.
    """
    messages = _messages(fields)
    add_generation_prompt = fields.flag("add_generation_prompt", True)
    add_special_tokens = fields.flag("add_special_tokens", False)
    extra = fields.mapping("chat_template_kwargs")
    for name in extra:
        if name in _RESERVED or not name.isidentifier():
            raise fields.wrong(
                "chat_template_kwargs", "made of identifiers that are not reserved", name
            )
    fields.neutral("chat_template", why="never comes from a client")
    fields.neutral("continue_final_message", False)
    fields.neutral("documents")

    async def render() -> list[int]:
        if frontend.template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or give "
                "model.chat_template at start"
            )
        text = await frontend.render(messages, add_generation_prompt=add_generation_prompt, **extra)
        ids = await frontend.encode(text, add_special_tokens=add_special_tokens)
        if not ids:
            raise InvalidRequest("messages come to an empty prompt", param="messages")
        return ids

    return render


class ChatWire:
    """The chat format of one response.

    Args:
        num_top: alternatives to report beside each token; None for no log-probabilities.
        prompt: token ids, for `return_token_ids`.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        options: Options,
        num_top: int | None,
        prompt: list[int],
    ) -> None:
        kind = "chat.completion.chunk" if options.stream else "chat.completion"
        self._head = Head("chatcmpl-", kind, model, include_usage=options.include_usage)
        self._tokenizer = tokenizer
        self._options = options
        self._num_top = num_top
        self._prompt = prompt
        self._plain = num_top is None and not options.return_token_ids
        self._opened: set[int] = set()
        before, self._after = self._head.event_parts()
        self._before = [
            before + b'{"index":%d,"delta":{"content":' % index for index in range(options.n)
        ]
        self._bare = b'},"logprobs":null,"finish_reason":null}' + self._after

    def events(self, delta: Delta) -> bytes:
        """See `Wire`."""
        index = delta.choice
        opening = b""
        if index not in self._opened:
            self._opened.add(index)
            opening = self._opening(index)
        if self._plain and delta.finish_reason is None:
            if not delta.text:
                return opening
            return opening + self._before[index] + encode(delta.text) + self._bare
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return opening
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta) if delta.token_ids else None,
            "finish_reason": delta.finish_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return opening + self._head.event_parts()[0] + encode(choice) + self._after

    def usage_event(self, usage: Usage) -> bytes:
        """See `Wire`."""
        return self._head.usage_event(usage)

    def document(self, answers: list[Answer], usage: Usage) -> bytes:
        """See `Wire`."""
        (answer,) = answers
        document: dict[str, Any] = dict(self._head.fields)
        document["choices"] = [
            self._choice(index, delta) for index, delta in enumerate(answer.choices)
        ]
        document["usage"] = usage_fields(usage)
        num_prompt_top = self._options.sampling["prompt_logprobs"]
        if num_prompt_top is not None:
            document["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, answer.prompt_logprobs, num_prompt_top
            )
        if self._options.return_token_ids:
            document["prompt_token_ids"] = self._prompt
        return encode(document)

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if self._options.return_token_ids:
            choice["prompt_token_ids"] = self._prompt
            choice["token_ids"] = delta.token_ids
        return choice

    def _opening(self, index: int) -> bytes:
        """The event that names the role; with the prompt's tokens if asked for."""
        extra: dict[str, Any] = {}
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._options.return_token_ids:
            extra["prompt_token_ids"] = choice["prompt_token_ids"] = self._prompt
        return self._head.event_parts(extra)[0] + encode(choice) + self._after

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        return chat_logprobs(self._tokenizer, delta.logprobs, self._num_top)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    values = fields.take("messages")
    if type(values) is not list or not 0 < len(values) <= MAX_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages", values)
    messages = []
    for index, value in enumerate(values):
        if type(value) is not dict:
            raise fields.wrong(f"messages[{index}]", "an object", value)
        messages.append(_message(Fields(value, f"messages[{index}].")))
    return messages


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.take("role")
    if type(role) is not str or role not in ROLES:
        if role in ("tool", "function"):
            raise fields.wrong("role", f"{', '.join(ROLES)} (tools are not supported)", role)
        raise fields.wrong("role", f"one of {', '.join(ROLES)}", role)
    message = {"role": "system" if role == "developer" else role, "content": _content(fields)}
    name = fields.text("name")
    if name is not None:
        message["name"] = name
    fields.neutral("tool_calls", [])
    for unused in ("refusal", "annotations", "audio", "function_call", "tool_call_id"):
        fields.neutral(unused, [])
    fields.finish()
    return message


def _content(fields: Fields) -> str:
    value = fields.take("content")
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise fields.wrong("content", "a string or a list of text parts", value)
    texts = []
    for index, part in enumerate(value):
        if type(part) is not dict:
            raise fields.wrong(f"content[{index}]", "a text part", part)
        part_fields = fields.inner(part, f"content[{index}].")
        if part.get("type") != "text":
            part_fields.take("type")
            raise part_fields.wrong("type", "text, the only kind supported", part.get("type"))
        part_fields.take("type")
        text = part_fields.text("text")
        if text is None:
            raise part_fields.wrong("text", "a string", None)
        texts.append(text)
        part_fields.finish()
    return "\n".join(texts)


def _read_max_tokens(fields: Fields, options: Options) -> None:
    new = fields.integer("max_completion_tokens", None, 1, 2**31 - 1)
    old = fields.integer("max_tokens", None, 1, 2**31 - 1)
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"max_tokens {old} and max_completion_tokens {new} differ; send one of them",
            param="max_completion_tokens",
        )
    options.max_tokens = old if new is None else new
    options.max_tokens_field = "max_tokens" if new is None else "max_completion_tokens"


def _num_top(fields: Fields, options: Options) -> int | None:
    wanted = fields.flag("logprobs", False)
    num_top = fields.integer("top_logprobs", None, 0, types.MAX_LOGPROBS)
    if num_top is not None and not wanted:
        raise InvalidRequest(
            f"top_logprobs {num_top} needs logprobs to be true", param="top_logprobs"
        )
    if options.stream and options.sampling["prompt_logprobs"] is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if not wanted:
        return None
    options.sampling["logprobs"] = num_top or 0
    return num_top or 0


def _refuse_unsupported(fields: Fields) -> None:
    fields.neutral("tools", [])
    fields.neutral("tool_choice", "none", "auto")
    fields.neutral("parallel_tool_calls", True, False)
    fields.neutral("functions", [])
    fields.neutral("function_call", "none", "auto")
    fields.neutral("modalities", ["text"])
    for name in ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"):
        fields.neutral(name)
    fields.neutral("echo", False)
