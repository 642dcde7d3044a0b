"""/v1/chat/completions: messages in through the chat template, an assistant's message out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from jaxserve import types
from jaxserve.errors import InvalidRequest, JaxserveError
from jaxserve.http.auth import Identity
from jaxserve.http.body import num_bytes
from jaxserve.http.errors import error_event
from jaxserve.http.frontend import Frontend
from jaxserve.http.generation import Delta, Usage
from jaxserve.http.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.http.reading import plan_message
from jaxserve.http.sampling import (
    Options,
    plan_outputs,
    read_options,
    refuse_unsupported,
    with_candidates_ranked,
)
from jaxserve.http.wire import Answer, Head, Work, encode, usage_fields
from jaxserve.text.conversation import chat_messages
from jaxserve.text.fields import Fields
from jaxserve.text.message import CallEnd, CallStart, CallText, Part, Text, Thought, gather
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.asked import read_toolbox
from jaxserve.text.tools.tool import Toolbox
from jaxserve.types import ModelInfo

#: Names that `chat_template_kwargs` may not take: arguments of rendering itself.
_RESERVED = frozenset(
    {
        *("self", "template", "messages", "toolbox", "tools"),
        *("add_generation_prompt", "conversation"),
    }
)


async def read_chat(
    fields: Fields, frontend: Frontend, model: ModelInfo, identity: Identity
) -> Work:
    """A validated chat request.

    Raises:
        InvalidRequest, ContextTooLong, Forbidden: what is wrong, by field, value and limit.
    """
    toolbox = read_toolbox(fields, num_bytes=num_bytes(fields, "tools"))
    render = read_messages(fields, frontend, toolbox)
    options = read_options(fields, model, frontend.tokenizer, identity, frontend.config.max_choices)
    _read_max_tokens(fields, options)
    num_top = _num_top(fields, options)
    _refuse_unsupported(fields)
    refuse_unsupported(fields)
    fields.finish()
    text, prompt = await render()
    await plan_message(frontend, model, options, toolbox, text)
    with_candidates_ranked(options)
    samplings = plan_outputs(
        options, [len(prompt)], None, model, frontend.positions_in_cache(), prompt_field="messages"
    )
    wire = ChatWire(model.name, frontend.tokenizer, options, num_top, prompt)
    return Work(prompts=[prompt], samplings=samplings, options=options, wire=wire)


def read_messages(
    fields: Fields, frontend: Frontend, toolbox: Toolbox
) -> Callable[[], Awaitable[tuple[str, list[int]]]]:
    """Reads the messages and what shapes their rendering.

    Returns:
        An async function that renders and tokenizes them: called once all else has been checked.
    """
    messages = chat_messages(fields)
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

    async def render() -> tuple[str, list[int]]:
        text = await frontend.render(
            messages, toolbox, add_generation_prompt=add_generation_prompt, **extra
        )
        ids = await frontend.encode(text, add_special_tokens=add_special_tokens)
        if not ids:
            raise InvalidRequest("messages come to an empty prompt", param="messages")
        return text, ids

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
        self.response_id: str = self._head.fields["id"]
        self._tokenizer = tokenizer
        self._options = options
        self._num_top = num_top
        self._prompt = prompt
        self._plain = num_top is None and not options.return_token_ids
        self._opened: set[int] = set()
        self._num_calls: dict[int, int] = {}
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
        if self._options.reader is not None:
            return opening + self._read_events(delta)
        if self._plain and delta.finish_reason is None:
            if not delta.text:
                return opening
            return opening + self._before[index] + encode(delta.text) + self._bare
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return opening
        content = {"content": delta.text} if delta.text else {}
        return opening + self._event(delta, content, last=True)

    def _read_events(self, delta: Delta) -> bytes:
        """A delta of a message that is read: an event for each part."""
        shown = [content for part in delta.parts if (content := self._part(delta.choice, part))]
        if not shown and not (delta.finish_reason or (delta.token_ids and not self._plain)):
            return b""
        if not shown or (delta.finish_reason and "tool_calls" in shown[-1]):
            shown.append({})
        last = len(shown) - 1
        return b"".join(
            self._event(delta, content, last=index == last) for index, content in enumerate(shown)
        )

    def _part(self, index: int, part: Part) -> dict[str, Any]:
        """A part of a message as a chunk's `delta`; empty if it does not show."""
        match part:
            case Text(text):
                return {"content": text}
            case Thought(text):
                return {"reasoning_content": text}
            case CallStart(call_id, name):
                number = self._num_calls.get(index, 0)
                self._num_calls[index] = number + 1
                function = {"name": name, "arguments": ""}
                call = {"index": number, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallText(text):
                number = self._num_calls[index] - 1
                return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
            case CallEnd():
                return {}

    def _event(self, delta: Delta, content: dict[str, Any], *, last: bool) -> bytes:
        """One event; the last of a delta has its tokens and its reason to end."""
        choice: dict[str, Any] = {
            "index": delta.choice,
            "delta": content,
            "logprobs": self._logprobs(delta) if last and delta.token_ids else None,
            "finish_reason": delta.finish_reason if last else None,
        }
        if last and self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return self._head.event_parts()[0] + encode(choice) + self._after

    def ending(self, usage: Usage) -> bytes:
        """See `Wire`."""
        return self._head.ending(usage)

    def failure(self, error: JaxserveError) -> bytes:
        """See `Wire`."""
        return error_event(error)

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
            "message": self._message(delta),
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if self._options.return_token_ids:
            choice["prompt_token_ids"] = self._prompt
            choice["token_ids"] = delta.token_ids
        return choice

    def _message(self, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if self._options.reader is None:
            return message
        read = gather(delta.parts)
        message["content"] = read.text or (None if read.calls else "")
        if read.reasoning is not None:
            message["reasoning_content"] = read.reasoning
        if read.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in read.calls
            ]
        return message

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
    fields.neutral("functions", [])
    fields.neutral("function_call", "none", "auto")
    fields.neutral("modalities", ["text"])
    for name in ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"):
        fields.neutral(name)
    fields.neutral("echo", False)
