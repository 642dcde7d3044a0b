"""What a request will cost, read from its body before any of it is worked on.

Only looks: a field of a wrong type counts as absent here, and whoever reads the body after us
refuses it by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.http.auth import MAX_PRIORITY, Identity
from jaxserve.http.body import Fields
from jaxserve.http.sampling import PRIORITIES
from jaxserve.limits.deadline import MAX_TIMEOUT_S
from jaxserve.limits.estimate import MESSAGE_BYTES, TEMPLATE_BYTES
from jaxserve.limits.wait import Newcomer

encode = msgspec.json.Encoder().encode

_MAX_TOKENS = 2**31 - 1
_MIN_TIMEOUT_S = 0.001


@dataclass(slots=True, kw_only=True)
class Demand:
    """What a request asks for.

    Attributes:
        text_bytes: of prompts that are text, with what their template adds; prompt_tokens: of
            those that are token ids.
        prompts, sequences: how many of each.
        max_tokens: of each sequence; None where it names none, 0 where nothing is generated.
        user: "" where it names none.
        timeout_s: None where it names none.
    """

    text_bytes: int
    prompt_tokens: int
    prompts: int
    sequences: int
    max_tokens: int | None
    priority: int
    user: str
    timeout_s: float | None

    def newcomer(self, identity: Identity, prompt_tokens: int) -> Newcomer:
        """The same for the estimate of its wait."""
        return Newcomer(
            priority=self.priority,
            tenant=identity.tenant,
            weight=identity.weight,
            sequences=self.sequences,
            tokens=prompt_tokens,
            output_tokens=self.max_tokens,
        )


#: Reads a body, whatever it asks for.
ReadDemand = Callable[[Fields, Identity], Demand]


def text_demand(*names: str) -> ReadDemand:
    """Reads a request's body that has texts in these fields and generates nothing."""

    def read(fields: Fields, identity: Identity) -> Demand:
        counts = [_count_texts(fields.peek(name)) for name in names]
        num_texts = max(1, *(texts for _, _, texts in counts))
        return Demand(
            text_bytes=sum(num_bytes for num_bytes, _, _ in counts),
            prompt_tokens=sum(num_tokens for _, num_tokens, _ in counts),
            prompts=num_texts,
            sequences=num_texts,
            max_tokens=0,
            priority=_priority(fields, identity),
            user=read_user(fields),
            timeout_s=_timeout_s(fields),
        )

    return read


def read_demand(fields: Fields, identity: Identity) -> Demand:
    """Reads a generating request's body.

    Raises:
        InvalidRequest: `timeout` is not a number of seconds.
    """
    timeout_s = _timeout_s(fields)
    text_bytes, prompt_tokens, prompts = _prompts(fields)
    candidates = max(_integer(fields, "n", 1), _integer(fields, "best_of", 1))
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    max_tokens = max(_integer(fields, name, 0) for name in names)
    return Demand(
        text_bytes=text_bytes,
        prompt_tokens=prompt_tokens,
        prompts=prompts,
        sequences=prompts * candidates,
        max_tokens=max_tokens or None,
        priority=_priority(fields, identity),
        user=read_user(fields),
        timeout_s=timeout_s,
    )


def _timeout_s(fields: Fields) -> float | None:
    timeout_s = fields.number("timeout", math.inf, _MIN_TIMEOUT_S, MAX_TIMEOUT_S)
    return None if math.isinf(timeout_s) else timeout_s


def read_user(fields: Fields) -> str:
    """Whom a request names as its user; "" where it names none."""
    user = fields.peek("user")
    return user if type(user) is str else ""


def _priority(fields: Fields, identity: Identity) -> int:
    priority = fields.peek("priority")
    priority = PRIORITIES.get(priority, priority) if type(priority) is str else priority
    if type(priority) is int and abs(priority) <= MAX_PRIORITY:
        return priority
    return identity.priority


def _prompts(fields: Fields) -> tuple[int, int, int]:
    """Bytes of text, token ids, and number of prompts."""
    messages = fields.peek("messages")
    if messages is None:
        messages = fields.peek("input")
        if type(messages) is str:
            messages = [{"content": messages}]
    if type(messages) is list:
        text_bytes = sum(map(_message_bytes, messages)) + _instruction_bytes(fields)
        return TEMPLATE_BYTES + text_bytes, 0, 1
    return _count_texts(fields.peek("prompt"))


def _count_texts(value: Any) -> tuple[int, int, int]:
    """Of a text, token ids, or a list of either: bytes of text, token ids, and how many."""
    values = value if type(value) is list and value else [value]
    if type(values[0]) is int:
        return 0, len(values), 1
    texts = [v.get("text") if type(v) is dict else v for v in values]
    text_bytes = sum(_text_bytes(text) + 1 for text in texts if type(text) is str)
    return text_bytes, sum(len(text) for text in texts if type(text) is list), len(values)


def _message_bytes(message: Any) -> int:
    if type(message) is not dict:
        return 0
    texts: list[Any] = [message.get("arguments")]
    for name in ("content", "output"):
        content = message.get(name)
        parts = content if type(content) is list else [content]
        texts += [part.get("text") if type(part) is dict else part for part in parts]
    calls = message.get("tool_calls")
    call_bytes = len(encode(calls)) if type(calls) is list else 0
    return MESSAGE_BYTES + call_bytes + sum(_text_bytes(t) for t in texts if type(t) is str)


def _instruction_bytes(fields: Fields) -> int:
    """Of what is said beside the messages."""
    tools, instructions = fields.peek("tools"), fields.peek("instructions")
    tool_bytes = len(encode(tools)) if type(tools) is list else 0
    return tool_bytes + (_text_bytes(instructions) if type(instructions) is str else 0)


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _integer(fields: Fields, name: str, default: int) -> int:
    value = fields.peek(name)
    return value if type(value) is int and 0 < value <= _MAX_TOKENS else default
