"""Which requests' traces are kept: decided twice, once at each end of a request.

At its beginning (`begins_sampled`), by the caller's flag or else by its trace id: all who look at
the same trace id with the same ratio decide the same, and the decision goes out in `traceparent`.
At its end (`Sampler`), when it is known how it went: what failed or was slow is kept in any case.
Spans are only built for what is kept.
"""

from __future__ import annotations

from jaxserve.config_observing import TracingConfig
from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.telemetry.tracing.context import TraceContext

#: Ends that are our doing. A request that is refused for its own fault, or by its owner's limit, is
#: answered as it should be; there may be very many of them.
FAILURES = frozenset({Outcome.FAILED, Outcome.SHED, Outcome.EXPIRED})

#: Of a trace id, the digits that are random by the recommendation (level 2): the last 56 bits.
_RANDOM_DIGITS = 14
_RANDOM_RANGE = 16**_RANDOM_DIGITS


def sampled_by_ratio(trace_id: str, ratio: float) -> bool:
    """Whether a trace is among this share of all.

    The larger ratio keeps all that the smaller keeps, so that services with different ones have
    whole traces in common (OpenTelemetry's consistent probability sampling).
    """
    return int(trace_id[-_RANDOM_DIGITS:], 16) >= (1 - ratio) * _RANDOM_RANGE


def begins_sampled(config: TracingConfig, trace_id: str, context: TraceContext | None) -> bool:
    """Whether a request that has just arrived will be kept however it ends.

    Args:
        context: of its caller; None where it has none.
    """
    if not config.endpoint:
        return context is not None and context.sampled  # passed on: others may keep it
    if context is not None and config.follow_caller:
        return context.sampled
    return sampled_by_ratio(trace_id, config.sample_ratio)


class Sampler:
    """Decides at the end of a request."""

    def __init__(self, config: TracingConfig) -> None:
        self._slow_ns = config.slow_ms * 1e6 or float("inf")
        self._slow_ttft_ns = config.slow_ttft_ms * 1e6 or float("inf")

    def keeps(self, record: RequestRecord) -> str:
        """Why a request's trace is kept: "failed", "slow" or "sampled"; empty where it is not."""
        if record.outcome in FAILURES:
            return "failed"
        ttft_ns = record.ttft_ns
        if record.done_ns - record.arrived_ns >= self._slow_ns or (
            ttft_ns is not None and ttft_ns >= self._slow_ttft_ns
        ):
            return "slow"
        return "sampled" if record.sampled else ""
