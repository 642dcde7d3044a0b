"""Quantiles by counts against exact ones."""

from __future__ import annotations

import math
import random

import pytest

from jaxserve.telemetry.sketch import ERROR, LARGEST, Sketch

SHARES = (0.5, 0.95, 0.99)


def exact(values: list[float], share: float) -> float:
    """The value of rank ⌈share · count⌉."""
    return sorted(values)[min(len(values), math.ceil(share * len(values) - 1e-9)) - 1]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 20_000])
def test_quantiles_are_within_the_stated_error(count):
    random.seed(count)
    values = [random.lognormvariate(3, 2) for _ in range(count)]
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    for share, found in zip(SHARES, sketch.quantiles(SHARES), strict=True):
        assert found == pytest.approx(exact(values, share), rel=ERROR * 1.0001)
    assert sketch.total == pytest.approx(sum(values))


def test_nothing_has_no_quantiles():
    assert Sketch().quantiles(SHARES) == (None, None, None)


def test_what_is_no_size_is_left_out_and_extremes_are_bounded():
    sketch = Sketch()
    for value in (math.nan, math.inf, -1.0):
        sketch.add(value)
    assert sketch.count == 0
    for value in (0.0, 1e-30, 1e300):
        sketch.add(value)
    low, high = sketch.quantiles((0.5, 1.0))
    assert low == pytest.approx(1e-6, rel=ERROR * 1.0001)
    assert high == pytest.approx(LARGEST, rel=ERROR * 1.0001)


def test_what_was_joined_is_parted_again():
    one, other = Sketch(), Sketch()
    for value in (1.0, 2.0, 2.0):
        one.add(value)
        other.add(value * 100)
    one.join(other)
    assert one.count == 6
    assert one.quantiles((0.9,))[0] == pytest.approx(200, rel=ERROR * 1.0001)
    one.part(other)
    assert one.count == 3
    assert one.total == 5
    assert one.quantiles((1.0,))[0] == pytest.approx(2, rel=ERROR * 1.0001)
    rest = Sketch()
    for value in (2.0, 1.0, 2.0):
        rest.add(value)
    one.part(rest)
    assert one.count == 0
    assert one.quantiles(SHARES) == (None, None, None)
