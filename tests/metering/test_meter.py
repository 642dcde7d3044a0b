"""Rates, requests' prices and what is charged for energy: it adds up to what was taken."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path

import pytest

from jaxserve.config import MeteringConfig
from jaxserve.metering.entry import Line, LineKind
from jaxserve.metering.live import LivePrices
from jaxserve.metering.meter import Meter
from jaxserve.metering.power.counters import Counter
from jaxserve.metering.power.power import Power, make_power
from jaxserve.metering.prices import make_prices
from jaxserve.metering.pricing import Rate, entry_of
from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import Outcome, RequestRecord

S = 10**9
CONFIG = MeteringConfig(
    hardware_per_hour=3.6, energy_per_kwh=0.36, power="modelled", idle_watts=100, busy_watts=300
)
PRICES = make_prices(CONFIG)


def record(*sequences: SequenceRecord, **values) -> RequestRecord:
    return RequestRecord(
        **{"request_id": "r1", "route": "/v1/completions", "arrived_ns": 1} | values,
        sequences=list(sequences),
    )


def make_meter(path: Path, power: Power | None = None, **values) -> Meter:
    return Meter(
        PRICES,
        power or make_power(CONFIG),
        **{"source": "a", "path": path / "meter.json", "now_ns": 0} | values,
    )


def cost_of(lines: list[Line], *kinds: LineKind) -> Decimal:
    return sum((line.cost for line in lines if line.kind in kinds), Decimal(0))


def test_a_request_costs_its_time_and_waste_is_not_charged():
    rate = Rate(prices=PRICES, watts=300)
    sequences = [
        SequenceRecord(prefill_device_ns=2 * S, decode_device_ns=S, wasted_device_ns=4 * S),
        SequenceRecord(decode_device_ns=3 * S),
    ]
    cost = rate.price(record(*sequences))
    a_second = Decimal("0.001") + 300 * Decimal("0.36") / 3_600_000
    assert cost.prefill == (2 * a_second).quantize(Decimal("1e-12"))
    assert cost.decode == (4 * a_second).quantize(Decimal("1e-12"))
    assert cost.wasted == (4 * a_second).quantize(Decimal("1e-12"))
    assert cost.total == cost.prefill + cost.decode
    assert cost.energy_j == 1800
    entry = entry_of(record(*sequences, tenant="acme", outcome=Outcome.LEFT), cost, 12.0)
    assert (entry.tenant, entry.outcome, entry.ended_s) == ("acme", "left", 12.0)
    assert entry.cost == cost.total and entry.wasted_cost == cost.wasted


def test_a_request_that_never_ran_costs_nothing():
    cost = Rate(prices=PRICES, watts=300).price(record(SequenceRecord()))
    assert cost.total == 0 and cost.energy_j == 0


def test_a_rate_is_told_whole():
    rate = Rate(prices=PRICES, watts=123.456)
    assert Rate.from_json(PRICES, rate.to_json()) == rate


@pytest.mark.parametrize("seed", range(5))
def test_what_work_is_charged_for_energy_is_what_it_took(tmp_path: Path, seed: int):
    """Power and load that jump about: each second's work is charged at the rate told before it."""
    draw, joules = random.Random(seed), [0.0]
    power = Power([Counter("nvml:0", lambda: joules[0])], 100, 700)
    meter = make_meter(tmp_path, power)
    meter.tick(0, 0)
    charged_j, watts, load = 0.0, 400.0, 0.5
    for second in range(1, 3601):
        if second % 120 == 0:
            watts, load = draw.uniform(300, 700), draw.uniform(0.1, 0.95)
        busy_ns = int(load * S)
        joules[0] += draw.gauss(watts, 20) * load + 100 * (1 - load)
        charged_j += meter.rate.watts * busy_ns / S
        meter.step(second * S, busy_ns)
        meter.tick(second * S, second)
    lines = meter.save(3601 * S, last=True)
    taken_j = sum(line.energy_j for line in lines if line.kind is LineKind.BUSY)
    assert charged_j == pytest.approx(taken_j, rel=0.005)
    energy_j = sum(line.energy_j for line in lines if line.kind is LineKind.ENERGY)
    assert energy_j == pytest.approx(joules[0], rel=0.001)


def test_lines_are_kept_until_they_are_taken_also_by_the_next_observer(tmp_path: Path):
    meter = make_meter(tmp_path)
    meter.step(10 * S, 5 * S)
    meter.tick(10 * S, 10)
    first = meter.save(10 * S)
    assert len(first) == 4  # and the ledger does not take them
    meter.step(12 * S, S)
    meter.tick(12 * S, 12)
    assert meter.save(12 * S) == first
    again = make_meter(tmp_path, now_ns=14 * S)
    again.step(12 * S, S)  # reported twice
    again.tick(16 * S, 16)
    given = again.save(30 * S, last=True)
    assert given[:4] == first and len(given) == 8
    assert sum(line.duration_ns for line in given if line.kind is LineKind.HARDWARE) == 12 * S
    assert sum(line.duration_ns for line in given if line.kind is LineKind.BUSY) == 6 * S
    again.kept(given)
    assert again.save(31 * S, last=True) == []


def test_another_server_makes_the_lines_of_the_one_before(tmp_path: Path):
    meter = make_meter(tmp_path)
    meter.step(5 * S, 5 * S)
    meter.tick(5 * S, 5)
    assert meter.save(5 * S) == []  # not yet, and it is killed now
    other = make_meter(tmp_path, source="b", now_ns=1000 * S)
    lines = other.save(1000 * S)
    (source,) = {line.source for line in lines}
    assert source.startswith("a-")
    assert sum(line.duration_ns for line in lines if line.kind is LineKind.HARDWARE) == 5 * S


@pytest.mark.parametrize(
    "content",
    [
        *("{", "{}", "[]", "null"),
        '{"life": "b", "source": "b-1", "lines": [{}], "hours": {}}',
        '{"life": "a", "source": "a-1", "lines": [], "hours": {"amounts": {"1": {"x": 1}}}}',
    ],
)
def test_a_file_that_is_broken_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
):
    (tmp_path / "meter.json").write_text(content)
    assert make_meter(tmp_path).save(0) == []
    assert "begins anew" in caplog.text
    saved = json.loads((tmp_path / "meter.json").read_text())
    assert saved["life"] == "a" and saved["source"] not in ("a", "a-1")


@pytest.mark.parametrize("damage", [lambda f: f.write_text("{"), lambda f: f.unlink()])
def test_lines_after_a_lost_file_are_none_that_the_ledger_has(tmp_path: Path, damage):
    """In one life of the server: their numbers begin anew, and so does their source."""

    def lines_of_ten_seconds(start_s: int) -> list[Line]:
        meter = make_meter(tmp_path, now_ns=start_s * S)
        meter.step((start_s + 10) * S, 5 * S)
        meter.tick((start_s + 10) * S, start_s + 10)
        return meter.save((start_s + 10) * S, last=True)

    first = lines_of_ten_seconds(0)
    damage(tmp_path / "meter.json")
    second = lines_of_ten_seconds(10)
    assert first and second
    keys = {(line.source, line.number) for line in first + second}
    assert len(keys) == len(first) + len(second)


def test_a_state_that_cannot_be_written_is_an_error(tmp_path: Path):
    meter = make_meter(tmp_path / "gone")
    with pytest.raises(OSError):
        meter.save(0)


def test_a_million_tokens_cost_what_those_of_the_last_minutes_did():
    live = LivePrices()
    assert live.per_million(0) == {}
    cost = Rate(prices=PRICES, watts=0).price(
        record(SequenceRecord(prefill_device_ns=S, decode_device_ns=3 * S))
    )
    entry = entry_of(record(prompt_tokens=1000, completion_tokens=100), cost, 0)
    for second in range(10):
        live.add(entry, second)
        live.spent(Decimal("0.01"), second)
    found = live.per_million(10)
    assert found["input"] == pytest.approx(1.0)  # 0.001 for 1000 tokens
    assert found["output"] == pytest.approx(30.0)
    assert found["all"] == pytest.approx(0.1 / 11000 * 1e6)
    assert live.per_million(1000) == {}
