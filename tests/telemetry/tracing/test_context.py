"""W3C trace context, against the recommendation's own rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.protocol.records import RequestRecord
from jaxserve.telemetry.tracing.context import (
    TraceContext,
    parse_traceparent,
    parse_tracestate,
    read_context,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize("name", [b"traceparent", b"Traceparent", b"TRACEPARENT", b"TraceParent"])
def test_the_header_is_read_in_any_case(name: bytes) -> None:
    context = read_context([(b"accept", b"*/*"), (name, GOOD.encode())])
    assert context == TraceContext(TRACE, SPAN, 1)
    assert context.sampled


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (GOOD, 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 3),
        (f"00-{TRACE}-{SPAN}-fe", 254),
        (f"01-{TRACE}-{SPAN}-01", 1),  # a later version, of which the beginning is known
        (f"01-{TRACE}-{SPAN}-01-more", 1),
        (f"cc-{TRACE}-{SPAN}-01-what-ever", 1),
    ],
)
def test_what_is_well_formed(text: str, flags: int) -> None:
    assert parse_traceparent(text) == TraceContext(TRACE, SPAN, flags)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        "garbage",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",  # version 00 has no more
        f"00-{TRACE}-{SPAN}-01-",
        f"01-{TRACE}-{SPAN}-01more",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE}-{SPAN}-01\n",
        "٠٠-" + GOOD[3:],  # digits, but not these
    ],
)
def test_what_is_malformed_is_as_if_it_had_not_come(text: str) -> None:
    assert parse_traceparent(text) is None
    if text.isascii() and text == text.strip():
        headers = [(b"traceparent", text.encode()), (b"tracestate", b"a=b")]
        assert read_context(headers) is None


def test_several_parents_say_nothing() -> None:
    assert read_context([(b"traceparent", GOOD.encode())] * 2) is None


def test_the_state_of_several_headers_is_one() -> None:
    headers = [
        (b"Tracestate", b"rojo=00f067aa0ba902b7, congo=t61rcWkgMzE"),
        (b"traceparent", b" " + GOOD.encode() + b"\t"),
        (b"TRACESTATE", b"t1@vendor=x y"),
    ]
    context = read_context(headers)
    assert context is not None
    assert context.tracestate == "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,t1@vendor=x y"


@pytest.mark.parametrize(
    "text",
    [
        *("a", "=b", "A=b", "a=b,a=c", "a=ü", "a=b=c", "a=" + "x" * 257, "a=b\x00", "a@=b"),
        *("ab@9x=c", ",".join(f"k{i}=v" for i in range(33))),
    ],
)
def test_a_state_that_is_malformed_is_dropped_alone(text: str) -> None:
    assert parse_tracestate(text) == ""
    headers = [(b"traceparent", GOOD.encode()), (b"tracestate", text.encode("utf-8"))]
    assert read_context(headers) == TraceContext(TRACE, SPAN, 1)


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_no_header_harms(parent: bytes, state: bytes) -> None:
    context = read_context([(b"traceparent", parent), (b"tracestate", state)])
    assert context is None or len(context.trace_id) == 32


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_what_is_given_out_can_be_read(trace: int, span: int, sampled: bool) -> None:
    record = RequestRecord(request_id="1", route="/v1/completions", arrived_ns=1, sampled=sampled)
    assert record.traceparent == ""
    record.trace_id, record.span_id = f"{trace:032x}", f"{span:016x}"
    assert parse_traceparent(record.traceparent) == TraceContext(
        f"{trace:032x}", f"{span:016x}", int(sampled)
    )
