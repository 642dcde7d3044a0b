"""What is kept: all that failed or was slow, and of the rest a share by trace id."""

from __future__ import annotations

import random

import pytest

from jaxserve.config import TracingConfig
from jaxserve.protocol.records import Outcome
from jaxserve.telemetry.tracing.context import TraceContext
from jaxserve.telemetry.tracing.sampling import Sampler, begins_sampled, sampled_by_ratio
from tests.telemetry.tracing.records import record

ON = TracingConfig(endpoint="http://c:4317", sample_ratio=0.1)
MS = 1_000_000


def ids(num: int) -> list[str]:
    """Trace ids as they are drawn."""
    rng = random.Random(7)
    return [f"{rng.getrandbits(128):032x}" for _ in range(num)]


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_share_is_kept(ratio: float) -> None:
    kept = sum(sampled_by_ratio(trace_id, ratio) for trace_id in ids(20_000))
    assert abs(kept - 20_000 * ratio) <= 4 * (20_000 * ratio * (1 - ratio)) ** 0.5


def test_a_larger_share_keeps_all_of_a_smaller_one() -> None:
    for trace_id in ids(2000):
        kept = [sampled_by_ratio(trace_id, ratio) for ratio in (0.01, 0.1, 0.3, 0.9)]
        assert kept == sorted(kept)


def test_the_end_points_of_the_share() -> None:
    assert sampled_by_ratio("f" * 32, 1e-9) and not sampled_by_ratio("f" * 32, 0)
    assert sampled_by_ratio("0" * 32, 1) and not sampled_by_ratio("0" * 32, 1 - 1e-9)


def test_the_caller_decides_where_it_is_followed() -> None:
    keeps, drops = TraceContext("0" * 32, "1" * 16, 1), TraceContext("f" * 32, "1" * 16, 0)
    assert begins_sampled(ON, keeps.trace_id, keeps)
    assert not begins_sampled(ON, drops.trace_id, drops)
    alone = TracingConfig(endpoint="http://c:4317", sample_ratio=0.1, follow_caller=False)
    assert not begins_sampled(alone, keeps.trace_id, keeps)
    assert begins_sampled(alone, drops.trace_id, drops)


def test_where_nothing_is_traced_the_caller_s_flag_is_passed_on() -> None:
    off = TracingConfig(sample_ratio=1.0)
    assert not begins_sampled(off, "f" * 32, None)
    assert begins_sampled(off, "f" * 32, TraceContext("f" * 32, "1" * 16, 1))


@pytest.mark.parametrize("outcome", Outcome)
def test_what_is_our_fault_is_always_kept(outcome: Outcome) -> None:
    failed = outcome in (Outcome.FAILED, Outcome.SHED, Outcome.EXPIRED)
    sampler = Sampler(ON)
    assert sampler.keeps(record(outcome=outcome, sampled=False)) == ("failed" if failed else "")
    assert sampler.keeps(record(outcome=outcome)) == ("failed" if failed else "sampled")


def test_what_is_slow_is_always_kept() -> None:
    sampler = Sampler(TracingConfig(slow_ms=10, slow_ttft_ms=2))
    quick = record(arrived_ns=0, sampled=False, done_ns=10 * MS - 1, first_token_ns=2 * MS - 1)
    assert sampler.keeps(quick) == ""
    quick.done_ns += 1
    assert sampler.keeps(quick) == "slow"
    quick.done_ns -= 1
    quick.first_token_ns += 1
    assert sampler.keeps(quick) == "slow"
    quick.first_token_ns = 0
    assert sampler.keeps(quick) == ""
    assert Sampler(TracingConfig(slow_ms=0, slow_ttft_ms=0)).keeps(record(sampled=False)) == ""
