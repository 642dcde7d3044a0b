"""What the console draws, by clocks of the tests' own."""

from __future__ import annotations

import json
import math

import pytest

from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import Begun, Outcome, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.telemetry import live as live_module
from jaxserve.telemetry.live import LATE_S, MAX_RECORDS, MAX_TENANTS, OTHERS, Live

S = 1_000_000_000
MS = 1_000_000


class Clocks:
    """A monotonic clock that begins at 1,000 s, and a wall clock."""

    def __init__(self) -> None:
        self.ns = 1000 * S
        self.offset_s = 1.7e9

    def wall_s(self) -> float:
        return self.ns / S + self.offset_s


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def live(clocks: Clocks) -> Live:
    return Live(lambda: clocks.ns, clocks.wall_s)


def request(number: int, at_s: float, **values) -> RequestRecord:
    """A request of half a second that ended then."""
    done_ns = int(at_s * S)
    return RequestRecord(
        **{
            "request_id": f"{number:032x}",
            "route": "/v1/completions",
            "arrived_ns": done_ns - 500 * MS,
            "first_token_ns": done_ns - 400 * MS,
            "done_ns": done_ns,
            "decode_ns": 90 * MS,
            "decode_tokens": 9,
            "prompt_tokens": 7,
            "completion_tokens": 10,
        }
        | values
    )


def step(at_s: float, **values) -> StepStats:
    """A step of 20 ms that was read then."""
    base = dict.fromkeys(
        ("step_id", "idle_ns", "padded_tokens", "prefill_tokens", "draft_tokens"), 0
    ) | dict.fromkeys(
        ("draft_accepted_tokens", "preemptions", "pages_cached", "prefix_lookup_tokens"), 0
    )
    return StepStats(
        **base
        | {
            "program": "",
            "device_ns": 20 * MS,
            "rows": 3,
            "tokens": 12,
            "decode_tokens": 12,
            "flops": 1000,
            "bytes": 500,
            "running": 3,
            "waiting": 1,
            "pages_used": 5,
            "pages_total": 100,
            "prefix_hit_tokens": 0,
            "compiles_after_warmup": 0,
            "at_ns": int(at_s * S),
        }
        | values
    )


def test_seconds_hold_what_happened_in_them(clocks, live):
    live.ended(request(1, 1001.5))
    live.ended(request(2, 1001.9, outcome=Outcome.FAILED, first_token_ns=0, decode_tokens=0))
    live.step(step(1001.2, draft_tokens=4, draft_accepted_tokens=1))
    live.step(step(1001.4, waiting=7, prefill_tokens=30))
    clocks.ns = 1003 * S
    series = live.series(1)
    assert (series["first"], series["next"], series["step_s"]) == (1000, 1002, 1)
    columns = series["columns"]
    assert columns["requests"] == [0, 2, 0]
    assert columns["bad"] == [0, 1, 0]
    assert columns["decode_tokens"] == [0, 12 - 3 + 12, 0]
    assert columns["prefill_tokens"] == [0, 30, 0]
    for name, ms in {"ttft_p50": 100, "tpot_p99": 10, "total_p50": 500}.items():
        later = pytest.approx(ms, rel=0.01)  # of the failed one there is none
        assert columns[name] == [None, later, later]
    assert columns["waiting"] == [None, 7, 7]  # carried on for a moment
    assert columns["step_ms"] == [None, 20, None]
    assert columns["rows"] == [None, 3, None]
    assert columns["busy"] == [None, 0.04, 0]
    assert columns["flops"] == [0, 2000, 0]


def test_no_traffic_is_gaps_and_never_nan(clocks, live):
    clocks.ns += 100_000 * S
    for step_s in (1, 60):
        series = live.series(step_s)
        text = json.dumps([series, live.now(), live.requests()], allow_nan=False)
        assert "NaN" not in text
        size = dict(live_module.RINGS)[step_s]
        assert size - 1 <= len(series["columns"]["requests"]) <= size
        assert set(series["columns"]["ttft_p99"]) == {None}
        assert set(series["columns"]["busy"]) == {None}
        assert set(series["columns"]["requests"]) == {0}


def test_quantiles_of_a_second_are_of_ten(clocks, live):
    for second, ms in ((0, 10), (3, 20), (5, 40)):
        at_s = 1000.5 + second
        live.ended(request(second, at_s, arrived_ns=int(at_s * S) - ms * MS))
    clocks.ns = 1020 * S
    expected = [10] * 3 + [10] * 2 + [20] * 5 + [20] * 3 + [40] * 2 + [None] * 5
    for since in (-1, 1008):
        found = live.series(1, since)["columns"]["total_p50"]
        for value, ms in zip(reversed(found), reversed(expected), strict=False):
            assert value == (ms if ms is None else pytest.approx(ms, rel=0.01))
    assert live.series(1)["columns"]["total_p99"][5] == pytest.approx(40, rel=0.01)


def test_a_one_token_answer_has_no_time_per_token(clocks, live):
    live.ended(request(1, 1000.5, decode_tokens=0, decode_ns=0, completion_tokens=1))
    clocks.ns = 1002 * S
    columns = live.series(1)["columns"]
    assert columns["tpot_p50"] == [None, None]
    assert columns["ttft_p50"][0] is not None
    assert live.requests()["rows"][0]["tpot_ms"] is None


def test_only_what_may_be_new_is_told_again(clocks, live):
    for second in range(100):
        live.ended(request(second, 1000.5 + second))
    clocks.ns = 1100 * S
    whole = live.series(1)
    assert whole["columns"]["requests"] == [1] * 100
    since = whole["next"]
    clocks.ns = 1103 * S
    live.ended(request(200, 1098.5))  # reported late
    again = live.series(1, since)
    assert again["first"] == since + 1 - LATE_S
    assert again["columns"]["requests"] == [1, 1, 1, 2, 1, 0, 0, 0]
    assert again["next"] == 1102
    rows = live.requests(since=100)
    assert [row["id"] for row in rows["rows"]] == [f"{200:032x}"]
    assert live.requests(since=rows["next"])["rows"] == []
    # One that was drawn from a machine that began again has all.
    assert len(live.series(1, 10**9)["columns"]["requests"]) == 103


def test_the_ring_forgets_and_is_never_written_by_what_is_too_old(clocks, live):
    live.ended(request(1, 1000.5))
    clocks.ns = 3000 * S
    live.ended(request(2, 2999.5))
    live.ended(request(3, 1000.6))  # sent again after a long outage: 2,000 s ago
    series = live.series(1)
    assert sum(series["columns"]["requests"]) == 1
    minutes = live.series(60)["columns"]["requests"]
    assert (minutes[0], minutes[-2]) == (2 / 20, pytest.approx(1 / 60, abs=0.001))
    assert minutes[-1] is None  # it has just begun


def test_a_minute_that_is_not_over_is_a_rate_of_what_was_seen(clocks, live):
    clocks.ns = 1020 * S  # a minute begins; the observer began 20 s before
    for number in range(10):
        live.ended(request(number, 1020 + number))
    clocks.ns = 1030 * S
    columns = live.series(60)["columns"]
    assert columns["requests"] == [0, 1]


def test_a_wall_clock_that_is_set_moves_the_axis_and_no_count(clocks, live):
    live.ended(request(1, 1000.5))
    clocks.ns = 1002 * S
    before = live.series(1)
    clocks.offset_s -= 86400
    after = live.series(1)
    assert after["columns"] == before["columns"]
    assert after["end_s"] == before["end_s"] - 86400
    assert live.requests()["rows"][0]["at_s"] == pytest.approx(1000 + clocks.offset_s)


def test_a_hung_engine_leaves_gaps(clocks, live):
    status = EngineStatus(state="ready", pid=1, step_age_s=0.0, at_ns=1000 * S, pages_total=9)
    for second in range(10):
        clocks.ns = (1001 + second) * S
        live.status(status)  # the last word again and again: it says nothing new
    columns = live.series(1)["columns"]
    assert columns["running"] == [0, 0, 0, 0] + [None] * 6
    assert live.now()["engine"]["age_s"] == 10


def test_what_is_open_is_counted(clocks, live):
    live.begun(Begun(request_id="a", arrived_ns=1000 * S, route="/v1/completions"))
    live.begun(Begun(request_id="b", arrived_ns=1001 * S, route="/v1/completions"))
    clocks.ns = 1005 * S
    assert (live.now()["requests_open"], live.now()["oldest_open_s"]) == (2, 5)
    live.ended(request(1, 1004, request_id="a"))
    assert (live.now()["requests_open"], live.now()["oldest_open_s"]) == (1, 4)


def test_memory_is_bounded_whatever_comes(clocks, live):
    for number in range(2000):
        live.ended(request(number, 1000.5, tenant=f"tenant-{number}"))
        live.news("deploy", 1000 * S, "x")
    assert len(live.requests()["rows"]) == MAX_RECORDS
    now = live.now()
    assert len(now["tenants"]) == MAX_TENANTS + 1
    others = next(row for row in now["tenants"] if row["tenant"] == OTHERS)
    assert others["requests"] == 2000 - MAX_TENANTS
    assert len(now["news"]) == live_module.MAX_NEWS
    assert live.record(f"{0:032x}") is None
    assert live.record(f"{1999:032x}").tenant == "tenant-1999"


def test_every_number_is_finite_though_a_record_is_nonsense(clocks, live):
    live.ended(request(1, 1000.5, first_token_ns=1, decode_ns=-5, decode_tokens=3))
    live.step(step(1000.2, device_ns=10 * S))
    clocks.ns = 1001 * S
    columns = live.series(1)["columns"]
    assert columns["busy"] == [1]
    assert columns["ttft_p50"] == columns["tpot_p50"] == [None]
    for column in columns.values():
        assert all(value is None or math.isfinite(value) for value in column)


def test_sequence_records_need_not_be_there(live):
    live.ended(request(1, 1000.5, sequences=[SequenceRecord()]))
    assert live.record(f"{1:032x}").sequences == [SequenceRecord()]
