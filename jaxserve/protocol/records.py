"""What is known of one request at its end: one record, from which all that watches is computed.

The HTTP worker opens a `RequestRecord` when a request reaches its outermost layer and completes it
at the last byte; the engine's part, a `SequenceRecord` for each choice, is inside. Tracing, SLOs,
metering, baselines and the console read records and nothing else of a request. Plain data: it
crosses to the observer's process (`http.observer`) as MessagePack.

Times are CLOCK_MONOTONIC nanoseconds, one clock for all processes of a machine; 0 where it has not
happened.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from decimal import Decimal

from jaxserve.protocol.messages import Interval, SequenceRecord


class Outcome(enum.StrEnum):
    """How a request ended, for whoever judges the service by it."""

    DONE = "done"  # answered to the last byte
    LEFT = "left"  # the client went away first
    REFUSED = "refused"  # the request's own fault: 4xx but 429
    LIMITED = "limited"  # a rate limit or a budget: 402, 429
    SHED = "shed"  # not taken, or not finished, because of load: 503 of Overloaded
    EXPIRED = "expired"  # its deadline passed
    FAILED = "failed"  # our fault: 5xx


@dataclass(slots=True, kw_only=True)
class Begun:
    """A request has reached the server: sent at once, so that one that never ends is seen too."""

    request_id: str
    arrived_ns: int
    route: str
    model: str = ""
    tenant: str = ""
    priority: int = 0
    adapter: str = ""


@dataclass(slots=True, kw_only=True)
class FirstToken:
    """A generating request has its first token: it is not waiting for a sign of life any more."""

    request_id: str
    at_ns: int


@dataclass(slots=True, kw_only=True)
class Asked:
    """What the request asked for, where it was said or is known; None otherwise."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    choices: int = 1


@dataclass(slots=True, kw_only=True)
class RequestCost:
    """What a request costs, priced once (`metering.pricing`).

    Attributes:
        prefill, decode: what it is charged for; wasted: what it is not.
        *_device_ns: its shares of the device's time.
        energy_j: of what it is charged for; carbon_g: of CO2.
    """

    currency: str
    prefill: Decimal
    decode: Decimal
    wasted: Decimal
    prefill_device_ns: int
    decode_device_ns: int
    wasted_device_ns: int
    energy_j: float
    carbon_g: float

    @property
    def total(self) -> Decimal:
        """What the request is charged for."""
        return self.prefill + self.decode


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request, from the first byte of its head to the last of its answer.

    Attributes:
        request_id: 32 hexadecimal digits, unique for ever; the response's `x-request-id`.
        response_id: the `id` in the answer's body; empty where there is none.
        trace_id, span_id: of the request's own span, hexadecimal.
        parent_id: span of the caller, as its `traceparent` says; tracestate: as it came.
        trace_flags: of `traceparent`; -1 where there was none.
        sampled: whether its trace is kept however it ends.
        model: as it is served; adapter: its name, or empty.
        key: who called: the key's name in the key file, never the key.
        user: the request's `user`, which subdivides the tenant.
        priority: smaller is served first.
        status: of the response; 499 where the client left before it began.
        error_code, error: what went wrong, also after a stream had begun.
        streamed: whether the answer came in pieces.
        read_ns: the body was complete; admitted_ns: let in; tokenized_ns: understood, and tokens;
            submitted_ns: given to the engine; first_token_ns: the first token was about to be sent
            or kept; done_ns: after the last byte.
        decode_ns: from each choice's first token to its last, on the engine's clock, added up;
            decode_tokens: those that were sampled in it.
        finish_reasons: of each choice that ended.
        reasoning_tokens: of the completion's; cached_tokens: of the prompt's.
        texts: embedded, or pairs scored.
        sequences: one for each sequence that the engine has ended.
        spans: other intervals of the front end, by kind.
        asked_content, answered_content: messages, as JSON; empty unless `tracing.record_content`.
        cost: where its answer has told it; else it is priced from `sequences`.
    """

    request_id: str
    route: str
    arrived_ns: int
    response_id: str = ""
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""
    tracestate: str = ""
    trace_flags: int = -1
    sampled: bool = False
    model: str = ""
    adapter: str = ""
    tenant: str = ""
    key: str = ""
    user: str = ""
    priority: int = 0
    status: int = 0
    outcome: Outcome = Outcome.DONE
    error_code: str = ""
    error: str = ""
    streamed: bool = False
    read_ns: int = 0
    admitted_ns: int = 0
    tokenized_ns: int = 0
    submitted_ns: int = 0
    first_token_ns: int = 0
    done_ns: int = 0
    decode_ns: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    texts: int = 0
    asked: Asked = field(default_factory=Asked)
    finish_reasons: list[str] = field(default_factory=list)
    sequences: list[SequenceRecord] = field(default_factory=list)
    spans: list[Interval] = field(default_factory=list)
    asked_content: str = ""
    answered_content: str = ""
    cost: RequestCost | None = None

    @property
    def traceparent(self) -> str:
        """The request's own span as W3C trace context; empty where it has none."""
        if not self.trace_id:
            return ""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    @property
    def ttft_ns(self) -> int | None:
        """From arrival to the first token; None where none came."""
        return self.first_token_ns - self.arrived_ns if self.first_token_ns else None

    @property
    def tpot_ns(self) -> float | None:
        """Time per output token after the first, over all choices; None where there was none."""
        return self.decode_ns / self.decode_tokens if self.decode_tokens else None
