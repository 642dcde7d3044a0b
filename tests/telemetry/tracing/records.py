"""Records of requests, as tests of tracing need them."""

from __future__ import annotations

from typing import Any

from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import RequestRecord

TRACE, SPAN, PARENT = "a" * 32, "b" * 16, "c" * 16


def record(**values: Any) -> RequestRecord:
    """A chat request of one choice that went as it should, from 100 to 2000."""
    whole = {
        "request_id": "d" * 32,
        "route": "/v1/chat/completions",
        "model": "smol",
        "trace_id": TRACE,
        "span_id": SPAN,
        "sampled": True,
        "status": 200,
        "arrived_ns": 100,
        "read_ns": 200,
        "admitted_ns": 300,
        "tokenized_ns": 450,
        "submitted_ns": 500,
        "first_token_ns": 1020,
        "done_ns": 2000,
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "finish_reasons": ["stop"],
        "sequences": [sequence()],
    }
    return RequestRecord(**(whole | values))


def sequence(**values: Any) -> SequenceRecord:
    """What the engine says of it."""
    whole = {
        "prompt_tokens": 7,
        "output_tokens": 5,
        "arrived_ns": 100,
        "queued_ns": 520,
        "scheduled_ns": 700,
        "first_token_ns": 1000,
        "done_ns": 1800,
        "traceparent": f"00-{TRACE}-{SPAN}-01",
        "pid": 4711,
    }
    return SequenceRecord(**(whole | values))
