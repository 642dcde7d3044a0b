"""W3C trace context: the caller's trace goes on here, and from here into the engine.

Both headers are read in any case, as ASGI gives them. A `traceparent` that the recommendation calls
malformed is as if it had not come; then the trace begins here, and its id is the request's id, so
that one number finds both. Needs no OpenTelemetry: HTTP workers use this and nothing else of it.

Source: https://www.w3.org/TR/trace-context/ (level 1), section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SAMPLED = 0x01

#: Version, trace id, span id, flags; what a later version adds stands behind another dash.
_TRACEPARENT = re.compile(
    r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
#: A `tracestate` that is longer is not passed on; the recommendation asks for 512 at least.
MAX_TRACESTATE = 1024
_MAX_MEMBERS = 32
_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[ -+\--<>-~]{0,255}[!-+\--<>-~]"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where a request comes from.

    Attributes:
        trace_id: 32 hexadecimal digits; span_id: 16, of the caller's span.
        flags: of `traceparent`, 0 to 255.
        tracestate: of other vendors, checked; empty where there is none, or it is malformed.
    """

    trace_id: str
    span_id: str
    flags: int
    tracestate: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the caller keeps its part of the trace."""
        return bool(self.flags & SAMPLED)


def read_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """The caller's context; None where there is none, or it is malformed.

    Args:
        headers: names in any case, and values, as ASGI has them.
    """
    parents: list[bytes] = []
    states: list[bytes] = []
    for name, value in headers:
        # Most headers differ in length alone, which is cheaper to see than their case.
        if len(name) == 11 and name.lower() == b"traceparent":
            parents.append(value)
        elif len(name) == 10 and name.lower() == b"tracestate":
            states.append(value)
    if len(parents) != 1:
        return None  # several say different things
    context = parse_traceparent(parents[0].decode("latin-1").strip(" \t"))
    if context is None or not states:
        return context
    tracestate = parse_tracestate(b",".join(states).decode("latin-1"))
    return TraceContext(context.trace_id, context.span_id, context.flags, tracestate)


def parse_traceparent(text: str) -> TraceContext | None:
    """The context that a `traceparent` says; None where it is malformed."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceContext(trace_id, span_id, int(flags, 16))


def parse_tracestate(text: str) -> str:
    """A `tracestate` as it may be passed on; empty where it is malformed."""
    members = [member.strip(" \t") for member in text.split(",")]
    members = [member for member in members if member]
    if len(members) > _MAX_MEMBERS or len(text) > MAX_TRACESTATE:
        return ""
    if not all(_MEMBER.fullmatch(member) for member in members):
        return ""
    keys = {member.partition("=")[0] for member in members}
    return ",".join(members) if len(keys) == len(members) else ""
