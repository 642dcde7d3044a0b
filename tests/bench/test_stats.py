"""Percentiles, intervals and the JSON line."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import percentile as numpy_percentile

from jaxserve.bench import stats
from jaxserve.config import Config


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.floats(0, 100),
)
def test_percentile_is_numpys(samples: list[float], percent: float) -> None:
    expected = float(numpy_percentile(samples, percent))
    assert stats.percentile(samples, percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(stats.percentile([], 50))
    assert stats.summary([]) == {}


def test_summary() -> None:
    values = stats.summary([float(n) for n in range(1, 101)])
    assert values == pytest.approx(
        {"mean": 50.5, "p50": 50.5, "p90": 90.1, "p99": 99.01, "max": 100.0}
    )


def test_ratio_interval_finds_a_constant_ratio_through_common_drift() -> None:
    drift = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 1.0, 0.7]
    ratio, low, high = stats.ratio_interval([2 * d for d in drift], drift)
    assert ratio == pytest.approx(2.0)
    assert low == pytest.approx(2.0)
    assert high == pytest.approx(2.0)


def test_ratio_interval_covers_one_where_nothing_differs() -> None:
    first = [1.0, 1.2, 0.9, 1.1, 1.05, 0.95]
    _, low, high = stats.ratio_interval(first, first[::-1])
    assert low < 1.0 < high


def test_ratio_interval_wants_pairs() -> None:
    for interval in (stats.ratio_interval, stats.pair_ratio_interval):
        with pytest.raises(ValueError, match="got 2 and 1"):
            interval([1.0, 2.0], [1.0])


def test_pair_ratio_interval_resolves_what_drift_hides() -> None:
    drift = [1.0 + 0.1 * (number % 7) for number in range(60)]
    noise = [1.0 + 0.01 * (number % 5 - 2) for number in range(60)]
    own = [1.03 * d * n for d, n in zip(drift, noise, strict=True)]
    ratio, low, high = stats.pair_ratio_interval(own, drift)
    assert ratio == pytest.approx(1.03)
    assert 1.015 <= low <= ratio <= high <= 1.045
    _, wide_low, wide_high = stats.ratio_interval(own, drift)
    assert wide_high - wide_low > 1.5 * (high - low)


def test_json_line_is_one_strict_line() -> None:
    line = stats.json_line({"a": math.nan, "b": 1 / 3, "config": Config(), "c": (1, "x\ny")})
    assert "\n" not in line
    read = json.loads(line)
    assert read["a"] is None
    assert read["b"] == 0.333333
    assert read["c"] == [1, "x\ny"]
    assert read["config"]["scheduler"]["max_rows"] == Config().scheduler.max_rows


def test_table_aligns() -> None:
    assert stats.table(["name", "n"], [["a", "1"], ["long one", "23"]]).splitlines() == [
        "| name     |  n |",
        "| -------- | -: |",
        "| a        |  1 |",
        "| long one | 23 |",
    ]
