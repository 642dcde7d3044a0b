"""Judges one request by one indicator. The table in docs/slo.md says the same in words."""

from __future__ import annotations

import enum

from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.telemetry.slo.indicator import TEXT_ROUTES, Indicator, Kind


class Verdict(enum.IntEnum):
    """What a request is for an indicator; also its column in counts."""

    GOOD = 0
    LATE = 1  # answered, or left by its client, after the promised time
    SHED = 2  # turned away, or given up, because of load
    ERRORED = 3
    EXPIRED = 4  # its deadline passed
    LOST = 5  # it had begun, and the server ended before it did
    CANCELLED = 6  # its client left in time
    REFUSED = 7  # its own fault: 4xx
    LIMITED = 8  # a rate limit or a budget of its own
    UNMEASURED = 9  # there is nothing to measure: an answer of one token has no TPOT


#: All that is our fault. Good and bad are counted; the others stand apart.
BAD = (Verdict.LATE, Verdict.SHED, Verdict.ERRORED, Verdict.EXPIRED, Verdict.LOST)
APART = (Verdict.CANCELLED, Verdict.REFUSED, Verdict.LIMITED, Verdict.UNMEASURED)

_OUTCOMES = {
    Outcome.REFUSED: Verdict.REFUSED,
    Outcome.LIMITED: Verdict.LIMITED,
    Outcome.SHED: Verdict.SHED,
    Outcome.EXPIRED: Verdict.EXPIRED,
    Outcome.FAILED: Verdict.ERRORED,
}


def judge(indicator: Indicator, record: RequestRecord, overdue_ns: int) -> Verdict:
    """The verdict on a request that has ended and falls under the indicator.

    Args:
        overdue_ns: how long a request may be without a sign of life, for the availability.
    """
    kind = indicator.kind
    if record.outcome in _OUTCOMES:
        verdict = _OUTCOMES[record.outcome]
        if kind is Kind.TPOT and verdict in BAD and _has_no_tpot(record):
            return Verdict.UNMEASURED
        return verdict
    if record.outcome is Outcome.LEFT:
        return Verdict.LATE if _was_late(indicator, record, overdue_ns) else Verdict.CANCELLED
    if not kind.is_latency:
        return Verdict.GOOD
    value_ns = _value_ns(kind, record)
    if value_ns is None:
        return Verdict.UNMEASURED
    return Verdict.GOOD if value_ns < indicator.threshold_ns else Verdict.LATE


def _value_ns(kind: Kind, record: RequestRecord) -> float | None:
    match kind:
        case Kind.TTFT:
            return record.ttft_ns
        case Kind.TPOT:
            return record.tpot_ns
    return record.done_ns - record.arrived_ns


def _was_late(indicator: Indicator, record: RequestRecord, overdue_ns: int) -> bool:
    """Whether the promise was broken before the client left."""
    waited_ns = record.done_ns - record.arrived_ns
    match indicator.kind:
        case Kind.TTFT:
            first_ns = record.ttft_ns
            return (waited_ns if first_ns is None else first_ns) >= indicator.threshold_ns
        case Kind.TPOT:
            return record.tpot_ns is not None and record.tpot_ns >= indicator.threshold_ns
        case Kind.E2E:
            return waited_ns >= indicator.threshold_ns
        case Kind.AVAILABILITY:
            return bool(overdue_ns) and not record.first_token_ns and waited_ns >= overdue_ns
    return False


def _has_no_tpot(record: RequestRecord) -> bool:
    """Whether it would have had none, had it been answered."""
    asked = record.asked.max_tokens
    return asked is not None and asked <= 1


def overdue_after_ns(indicator: Indicator, overdue_ns: int) -> int | None:
    """After how long without an end, or a first token, an unfinished request counts as bad.

    None where that can only be said at its end: a rate of tokens, or of errors.
    """
    match indicator.kind:
        case Kind.TTFT | Kind.E2E:
            return indicator.threshold_ns
        case Kind.AVAILABILITY:
            return overdue_ns or None
    return None


def awaits_first_token(indicator: Indicator, route: str) -> bool:
    """Whether a first token ends the wait that `overdue_after_ns` bounds."""
    return indicator.kind is not Kind.E2E and route not in TEXT_ROUTES
