"""An hour adds up: hardware and energy are busy and idle, whatever the clocks do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest

from jaxserve.config import MeteringConfig
from jaxserve.errors import ConfigError
from jaxserve.metering.entry import Line, LineKind
from jaxserve.metering.hours import LAG_S, Hours, Interval
from jaxserve.metering.prices import make_prices

S = 10**9
HOUR = 3600
PRICES = make_prices(
    MeteringConfig(hardware_per_hour=3.6, energy_per_kwh=0.36, pue=2.0, carbon_g_per_kwh=36)
)


def constant(interval: Interval) -> tuple[float, float]:
    """100 W, all the time."""
    return (
        100 * (interval.end_ns - interval.start_ns) / S,
        100 * interval.busy_ns / S,
    )


def make_hours(**values) -> Hours:
    return Hours(PRICES, constant, **{"source": "a", "start_ns": 0} | values)


def summed(lines: list[Line]) -> Mapping[int, Mapping[LineKind, list]]:
    """By hour and kind: cost and duration, added up."""
    found: Any = defaultdict(lambda: defaultdict(lambda: [Decimal(0), 0, 0.0]))
    for line in lines:
        total = found[line.hour][line.kind]
        total[0] += line.cost
        total[1] += line.duration_ns
        total[2] += line.energy_j
    return found


def check(lines: list[Line]) -> None:
    """Each hour's books are closed."""
    for kinds in summed(lines).values():
        cost = {kind: total[0] for kind, total in kinds.items()}
        assert cost[LineKind.HARDWARE] + cost[LineKind.ENERGY] == (
            cost[LineKind.BUSY] + cost[LineKind.IDLE]
        )
        length = {kind: total[1] for kind, total in kinds.items()}
        assert length[LineKind.HARDWARE] == length[LineKind.BUSY] + length[LineKind.IDLE]


def test_an_hour_costs_its_price_and_its_energy():
    hours, lines = make_hours(), []
    for second in range(1, HOUR + 1):
        hours.step(second * S, S // 4)
        hours.settle(second * S, 7 * HOUR + second)
        if second % 10 == 0:
            lines += hours.lines()
    check(lines)
    (found,) = summed(lines).values()
    assert lines[0].hour == 7
    assert found[LineKind.HARDWARE][0] == pytest.approx(Decimal("3.6"))
    # 100 W for an hour are 0.1 kWh at 0.36, twice for PUE
    assert found[LineKind.ENERGY][0] == pytest.approx(Decimal("0.072"))
    assert found[LineKind.BUSY][0] == pytest.approx(Decimal("3.672") / 4)
    assert found[LineKind.ENERGY][2] == pytest.approx(360_000)
    assert {line.source for line in lines} == {"a"}
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))


def test_an_hours_boundary_splits_what_lies_across_it():
    hours = make_hours()
    hours.step(10 * S, 8 * S)
    hours.settle(10 * S, HOUR + 4)  # it was 6 s to the hour when this began
    lines = hours.lines()
    check(lines)
    found = summed(lines)
    assert found[0][LineKind.HARDWARE][1] == 6 * S and found[1][LineKind.HARDWARE][1] == 4 * S
    assert found[0][LineKind.BUSY][1] + found[1][LineKind.BUSY][1] == 8 * S


@pytest.mark.parametrize("jump_s", [-7200, -30, 30, 7200])
def test_a_wall_clock_that_is_set_changes_names_and_no_amounts(jump_s: int):
    hours, lines = make_hours(), []
    for second in range(1, 101):
        hours.step(second * S, S // 2)
        wall_s = 5 * HOUR + second + (jump_s if second > 50 else 0)
        hours.settle(second * S, wall_s)
    lines = hours.lines()
    check(lines)
    total = sum(line.duration_ns for line in lines if line.kind is LineKind.HARDWARE)
    assert total == 100 * S


def test_without_traffic_and_without_an_engine_all_is_idle():
    hours = make_hours()
    for second in range(1, 121):
        hours.settle(second * S, second)
    (found,) = summed(hours.lines()).values()
    assert found[LineKind.HARDWARE][1] == found[LineKind.IDLE][1] == int((120 - LAG_S) * S)
    assert found[LineKind.BUSY][0] == 0


def test_a_step_longer_than_the_lag_takes_idle_time_back():
    hours = make_hours()
    for second in range(1, 41):
        hours.settle(second * S, second)
    hours.step(41 * S, 40 * S)
    hours.settle(41 * S, 41)
    lines = hours.lines()
    check(lines)
    (found,) = summed(lines).values()
    assert found[LineKind.BUSY][1] == 40 * S and found[LineKind.IDLE][1] == 1 * S


def test_the_next_observer_goes_on_and_counts_nothing_twice():
    first = make_hours()
    first.step(10 * S, 5 * S)
    first.settle(10 * S, 10)
    lines = first.lines()
    first.step(20 * S, 6 * S)
    first.settle(20 * S, 20)
    second = make_hours(start_ns=30 * S, state=first.state())
    second.step(20 * S, 6 * S)  # reported again, since it was not known to be kept
    second.step(35 * S, 2 * S)
    second.settle(35 * S, 35)
    lines += second.lines()
    check(lines)
    assert len({line.number for line in lines}) == len(lines)
    (found,) = summed(lines).values()
    assert found[LineKind.HARDWARE][1] == 35 * S and found[LineKind.BUSY][1] == 13 * S


def test_time_that_does_not_pass_is_not_settled():
    hours = make_hours(start_ns=5 * S)
    assert hours.settle(5 * S, 0) is None
    assert hours.settle(4 * S, 0) is None
    assert hours.lines() == []


def test_a_currency_has_three_letters():
    with pytest.raises(ConfigError, match="USD"):
        make_prices(MeteringConfig(currency="dollars"))
    assert make_prices(MeteringConfig(currency="eur")).currency == "EUR"
