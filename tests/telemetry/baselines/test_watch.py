"""Records and steps become baselines, and shifts of them are found."""

from __future__ import annotations

import json
import math
import random

import pytest

from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.telemetry.baselines import watch as watch_module
from jaxserve.telemetry.baselines.series import MIN_EVENTS
from jaxserve.telemetry.baselines.watch import STALE_S, Baselines
from jaxserve.types import DeviceInfo, ModelInfo
from tests.fakes.clock import Clock

STEP = {
    "step_id": 1,
    "program": "decode_r8",
    "idle_ns": 0,
    "padded_tokens": 8,
    "draft_tokens": 0,
    "draft_accepted_tokens": 0,
    "flops": 1,
    "running": 8,
    "waiting": 0,
    "pages_used": 0,
    "pages_total": 1,
    "preemptions": 0,
    "pages_cached": 0,
    "prefix_lookup_tokens": 0,
    "prefix_hit_tokens": 0,
    "compiles_after_warmup": 0,
}


class Server:
    """Steps and requests of a simulated server, into baselines."""

    def __init__(self, **settings) -> None:
        self.chance = random.Random(1)
        self.clock = Clock(1000.0)
        self.baselines = self.make(**settings)

    def make(self, **settings) -> Baselines:
        return Baselines(
            **{"model": "m", "version": "v1", "device": "cpu", "baseline_samples": 60} | settings,
            wall=Clock(1e9),
        )

    def step(self, device_ms: float = 10.0, rows: int = 8, **more) -> None:
        noisy = device_ms * (1 + 0.02 * self.chance.gauss(0, 1))
        values = STEP | {
            "device_ns": round(noisy * 1e6),
            "rows": rows,
            "tokens": rows,
            "decode_tokens": rows,
            "prefill_tokens": 0,
            "bytes": 1_000_000,
            "at_ns": round(self.clock.now_s * 1e9),
        }
        self.baselines.step(StepStats(**values | more))

    def request(self, ttft_ms: float = 50.0, tpot_ms: float = 10.0, **more) -> None:
        now_ns = round(self.clock.now_s * 1e9)
        noise = 1 + 0.02 * self.chance.gauss(0, 1)
        values = {
            "request_id": "1",
            "route": "/v1/completions",
            "arrived_ns": now_ns - 1_000_000_000,
            "first_token_ns": now_ns - 1_000_000_000 + round(ttft_ms * noise * 1e6),
            "done_ns": now_ns,
            "decode_ns": round(9 * tpot_ms * noise * 1e6),
            "decode_tokens": 9,
            "prompt_tokens": 100,
            "completion_tokens": 10,
        }
        self.baselines.ended(RequestRecord(**values | more))

    def run(self, samples: int, factor: float = 1.0) -> None:
        """So many samples of 10 s of each series."""
        for _ in range(samples):
            for _ in range(20):
                self.clock.advance(0.55)
                self.step(10.0 * factor)
                self.request(50.0 * factor, 10.0 * factor)
            self.baselines.tick(self.clock.now_s)

    @property
    def degraded(self) -> set[str]:
        return {series.key.metric for series in self.baselines.degraded()}


def test_series_of_each_metric_and_band_with_their_values():
    server = Server()
    server.run(60)
    for _ in range(60):
        server.clock.advance(1.0)
        server.step(rows=2, program="decode_r2", draft_tokens=4, draft_accepted_tokens=3)
    shown = {(s["metric"], s["band"]): s for s in server.baselines.describe()}
    assert set(shown) == {
        ("ttft", "prompt 64-255, rows 8-15"),
        ("tpot", "rows 8-15"),
        ("step_time", "decode_r8"),
        ("step_time", "decode_r2"),
        ("mbu", "decode_r8"),
        ("mbu", "decode_r2"),
        ("throughput", "decode, rows 8-15"),
        ("throughput", "decode, rows 2-3"),
        ("accept_rate", "rows 2-3"),
    }
    assert shown["step_time", "decode_r8"]["baseline"] == pytest.approx(0.010, rel=0.02)
    assert shown["ttft", "prompt 64-255, rows 8-15"]["baseline"] == pytest.approx(0.05, rel=0.02)
    assert shown["tpot", "rows 8-15"]["baseline"] == pytest.approx(0.010, rel=0.02)
    assert shown["throughput", "decode, rows 8-15"]["baseline"] == pytest.approx(800, rel=0.02)
    assert shown["mbu", "decode_r8"]["baseline"] == pytest.approx(1e8, rel=0.02)
    assert shown["accept_rate", "rows 2-3"]["last"] == pytest.approx(0.75)
    assert not any(series["degraded"] for series in shown.values())
    json.dumps(server.baselines.describe(), allow_nan=False)


def test_a_slower_engine_shows_in_its_series_and_no_longer_once_it_is_over():
    server = Server()
    server.run(80)
    assert server.degraded == set()
    server.run(10, factor=1.05)
    assert server.degraded == {"ttft", "tpot", "step_time", "mbu", "throughput"}
    server.run(15)
    assert server.degraded == set()
    what = [change["what"] for change in server.baselines.changes]
    assert what.count("worse") == what.count("recovered") == 5


def test_faster_is_no_degradation():
    server = Server()
    server.run(80)
    server.run(10, factor=0.8)
    assert server.degraded == set()
    assert {change["what"] for change in server.baselines.changes} == {"better"}


def status(name: str = "m", device: DeviceInfo | None = None) -> EngineStatus:
    model = ModelInfo(name=name, max_context=8, vocab_size=8, eos_token_ids=(), cache_groups=())
    return EngineStatus(state="ready", pid=1, step_age_s=0.0, model=model, device=device)


def test_nothing_is_counted_before_the_engine_says_what_it_computes_on():
    server = Server(device="")
    server.run(2)
    server.baselines.status(EngineStatus(state="loading", pid=1, step_age_s=0.0), 0.0)
    server.run(2)
    assert server.baselines.describe() == []
    server.baselines.status(status(device=DeviceInfo(kind="TPU v5e", count=4)), server.clock.now_s)
    server.run(2)
    assert {s["device"] for s in server.baselines.describe()} == {"4 x TPU v5e"}


def test_an_engine_that_comes_back_with_fewer_devices_has_other_baselines():
    four, two = (DeviceInfo(kind="x", count=count) for count in (4, 2))
    server = Server()
    server.baselines.status(status(device=four), server.clock.now_s)
    server.run(80)
    server.baselines.status(status(device=two), server.clock.now_s)
    server.run(20, factor=2.0)
    assert server.degraded == set()  # it is another machine
    server.baselines.status(status(device=four), server.clock.now_s)
    server.run(10, factor=1.05)
    assert "step_time" in server.degraded  # and the first is found again


def test_an_alarm_of_what_is_no_longer_served_is_not_told_any_more():
    server = Server()
    server.run(80)
    server.run(8, factor=1.3)
    assert server.degraded
    server.baselines.status(status("other", DeviceInfo(kind="x")), server.clock.now_s)
    assert server.degraded == set()
    assert server.baselines.models() == {"m", "other"}  # so that the first's incident ends


def test_a_change_is_noted():
    server = Server()
    server.baselines.changed("weights of Tuesday")
    assert server.baselines.changes[-1]["what"] == "marked"
    assert server.baselines.changes[-1]["reason"] == "weights of Tuesday"


def test_no_traffic_is_no_sample():
    server = Server()
    server.run(60)
    before = {str(s["metric"]): s["samples"] for s in server.baselines.describe()}
    for _ in range(1000):
        server.clock.advance(10)
        server.baselines.tick(server.clock.now_s)
    assert {str(s["metric"]): s["samples"] for s in server.baselines.describe()} == before


def test_little_traffic_waits_for_enough():
    server = Server()
    for _ in range(MIN_EVENTS - 1):
        server.clock.advance(60)
        server.step()
    server.baselines.tick(server.clock.now_s)
    (series,) = [s for s in server.baselines.describe() if s["metric"] == "step_time"]
    assert series["samples"] == 0
    server.step()
    server.baselines.tick(server.clock.now_s)
    (series,) = [s for s in server.baselines.describe() if s["metric"] == "step_time"]
    assert series["samples"] == 1


@pytest.mark.parametrize(
    "values",
    [
        {"outcome": Outcome.FAILED},
        {"outcome": Outcome.LEFT},
        {"outcome": Outcome.SHED},
        {"first_token_ns": 0, "decode_tokens": 0},
        {"done_ns": 0},
        {"first_token_ns": 1, "decode_tokens": 0},  # before it arrived
    ],
)
def test_requests_that_say_nothing_of_speed(values):
    server = Server()
    server.request(**values)
    assert server.baselines.describe() == []


def test_one_token_answers_have_no_tpot():
    server = Server()
    server.request(decode_ns=0, decode_tokens=0)
    assert [series["metric"] for series in server.baselines.describe()] == ["ttft"]


@pytest.mark.parametrize("values", [{"device_ns": 0}, {"rows": 0}, {"at_ns": 0}, {"device_ns": -5}])
def test_steps_that_say_nothing_of_speed(values):
    server = Server()
    server.step(**values)
    assert server.baselines.describe() == []


def test_waiting_for_requests_is_not_lost_throughput_waiting_for_the_host_is():
    server = Server()
    for _ in range(30):
        server.clock.advance(1)
        server.step(running=0, idle_ns=900_000_000)  # nobody had asked for anything
    server.baselines.tick(server.clock.now_s + 20)
    (series,) = [s for s in server.baselines.describe() if s["metric"] == "throughput"]
    assert series["last"] == pytest.approx(800, rel=0.02)
    for _ in range(30):
        server.clock.advance(1)
        server.step(running=8, idle_ns=10_000_000)
    server.baselines.tick(server.clock.now_s + 20)
    (series,) = [s for s in server.baselines.describe() if s["metric"] == "throughput"]
    assert series["last"] == pytest.approx(400, rel=0.05)


def test_baselines_and_alarms_go_on_after_a_restart():
    server = Server()
    server.run(80)
    server.run(8, factor=1.2)
    before = server.degraded
    assert before
    state = json.loads(json.dumps(server.baselines.state(), allow_nan=False))
    server.baselines = server.make()
    server.baselines.restore(state, server.clock.now_s)
    assert server.degraded == before
    server.run(15)
    assert server.degraded == set()


def test_another_version_has_its_own_baseline_and_the_old_one_is_found_again():
    server = Server()
    server.run(80)
    state = server.baselines.state()
    server.baselines = server.make(version="v2")
    server.baselines.restore(state, server.clock.now_s)
    server.run(80, factor=1.3)  # no degradation: it is another
    assert server.degraded == set()
    state = server.baselines.state()
    server.baselines = server.make()
    server.baselines.restore(state, server.clock.now_s)
    server.run(8, factor=1.1)  # back to the old one, which was faster
    assert "step_time" in server.degraded


def test_an_alarm_of_a_load_that_is_gone_is_over():
    server = Server()
    server.run(80)
    server.run(8, factor=1.3)
    assert server.degraded
    server.clock.advance(STALE_S + 1)
    server.baselines.tick(server.clock.now_s)
    assert server.degraded == set()
    assert server.baselines.changes[-1]["what"] == "stale"


def test_bands_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch_module, "MAX_SERIES", 20)
    monkeypatch.setattr(watch_module, "MAX_SHELVED", 30)
    server = Server()
    for number in range(200):
        server.clock.advance(1)
        server.step(program=f"decode_r{number}")
    assert len(server.baselines.describe()) == 20
    assert len(server.baselines.state()["series"]) <= 50


@pytest.mark.parametrize(
    "state",
    [{}, {"series": [{}], "changes": []}, {"series": 3, "changes": []}, {"series": []}],
)
def test_a_broken_state_is_refused(state):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Server().baselines.restore(state, 0.0)


def test_what_is_no_number_spoils_nothing():
    server = Server()
    server.run(60)
    server.step(device_ms=1, bytes=math.nan)
    server.run(2)
    assert all(series["last"] is not None for series in server.baselines.describe())
