"""Where a finished series changed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxserve.telemetry.baselines.segments import clip_outliers, find_changes, partition


def noise(length: int, seed: int, spread: float = 0.02) -> np.ndarray:
    return 100 * (1 + spread * np.random.default_rng(seed).standard_normal(length))


@pytest.mark.parametrize("seed", range(10))
def test_a_step_is_found_where_it_is(seed: int):
    values = noise(120, seed)
    values[70:] *= 1.1
    (change,) = find_changes(values.tolist())
    assert abs(change.index - 70) <= 1
    assert change.shift == pytest.approx(0.1, abs=0.02)
    assert change.p_value < 1e-6


def test_a_regression_and_its_repair_are_two_changes():
    values = noise(100, 1)
    values[40:52] *= 1.3
    assert [change.index for change in find_changes(values.tolist())] == [40, 52]


def test_a_change_of_spread_is_one_unless_only_shifts_are_asked_for():
    values = np.concatenate([noise(100, 2, 0.01), noise(100, 3, 0.08)])
    (change,) = find_changes(values.tolist())
    assert abs(change.index - 100) <= 6
    assert find_changes(values.tolist(), min_shift=0.05) == []


def test_nothing_is_seen_in_noise():
    found = [len(find_changes(noise(200, seed).tolist())) for seed in range(60)]
    assert sum(found) <= 2


def test_outliers_are_no_changes():
    values = noise(150, 4)
    values[[20, 60, 100]] *= [3, 0.2, 10]
    assert find_changes(values.tolist()) == []
    clipped = clip_outliers(values)
    assert np.all(np.abs(clipped - 100) < 20)
    untouched = np.setdiff1d(np.arange(150), [20, 60, 100])
    assert np.mean(clipped[untouched] == values[untouched]) > 0.97


def test_two_values_in_turn_by_chance_are_no_changes():
    values = np.where(np.random.default_rng(5).random(300) < 0.5, 100.0, 105.0)
    assert find_changes(values.tolist()) == []


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 50, [math.nan] * 20, [0.0] * 30])
def test_too_little_and_constants(values: list[float]):
    assert find_changes(values) == []


def test_missing_samples_are_passed_over():
    values = noise(100, 6)
    values[50:] *= 1.2
    values[10:20] = math.nan
    assert [change.index for change in find_changes(values.tolist())] == [50]


def test_the_partition_is_the_best_of_all():
    """Against all ways to cut a short series."""
    values = np.array([1.0, 1.1, 0.9, 1.0, 1.05, 3.0, 3.1, 2.9, 3.05, 3.0, 2.95])
    assert partition(values) == [0, 5, 11]
