"""What the answers of all endpoints share, and the protocol by which the endpoint writes them.

A `Wire` writes one request's answer: as events while it runs, or as one document at its end. The
constant parts of an event are encoded once a request; per event only the new text is.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from jaxserve.errors import JaxserveError
from jaxserve.http.generation import Delta, Usage
from jaxserve.http.sampling import Options
from jaxserve.http.sse import DONE
from jaxserve.types import SamplingParams, TokenLogprobs

encode = msgspec.json.Encoder().encode


class Wire(Protocol):
    """One response format, for one request.

    Attributes:
        response_id: the `id` of the answer.
    """

    response_id: str

    def events(self, delta: Delta) -> bytes:
        """A delta as server-sent events; empty if it brings nothing that shows."""
        ...

    def ending(self, usage: Usage) -> bytes:
        """The last events of a stream."""
        ...

    def failure(self, error: JaxserveError) -> bytes:
        """The last events of a stream that cannot go on."""
        ...

    def document(self, answers: list[Answer], usage: Usage) -> bytes:
        """The whole response."""
        ...


@dataclass(slots=True, kw_only=True)
class Answer:
    """All that came for one prompt.

    Attributes:
        choices: the n to answer with, best first where they were ranked.
        prompt_logprobs: of prompt tokens after the first, if asked for.
    """

    choices: list[Delta]
    prompt_logprobs: Sequence[TokenLogprobs] = ()


@dataclass(slots=True, kw_only=True)
class Work:
    """A validated request: what to generate, and how to write it."""

    prompts: list[list[int]]
    samplings: list[SamplingParams]
    options: Options
    wire: Wire


class Head:
    """The fields that open every chunk and document of one response."""

    def __init__(self, prefix: str, kind: str, model: str, *, include_usage: bool) -> None:
        self.fields = {
            "id": prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._include_usage = include_usage

    def event_parts(self, extra: dict[str, Any] | None = None) -> tuple[bytes, bytes]:
        """What stands before and after the one choice of an event."""
        before = b"data: " + encode(self.fields | (extra or {}))[:-1] + b',"choices":['
        after = b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"
        return before, after

    def ending(self, usage: Usage) -> bytes:
        """The usage, if it was asked for, and [DONE]."""
        if not self._include_usage and usage.cost is None:
            return DONE
        document = {**self.fields, "choices": [], "usage": usage_fields(usage)}
        return b"data: " + encode(document) + b"\n\n" + DONE


def usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens:
        fields["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return fields | cost_fields(usage)


def cost_fields(usage: Usage) -> dict[str, Any]:
    """`cost` of a usage object, where the request asked for it."""
    cost = usage.cost
    if cost is None:
        return {}
    fields = {
        "total": float(cost.total),
        "prefill": float(cost.prefill),
        "decode": float(cost.decode),
        "currency": cost.currency,
        "device_ms": (cost.prefill_device_ns + cost.decode_device_ns) / 1e6,
        "energy_j": cost.energy_j,
    }
    return {"cost": fields}
