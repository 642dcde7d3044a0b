"""How soon a shift is found, and how seldom one is seen where there is none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxserve.telemetry.baselines.detector import MIN_SAMPLES, Detector, Finding

NUM_POINTS = 10_000


def noise(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """A series that does not change, around 100."""
    normal = rng.standard_normal(length)
    match kind:
        case "normal":
            return 100 * (1 + 0.02 * normal)
        case "wide":
            return 100 * (1 + 0.1 * normal)
        case "heavy tails":
            return 100 * (1 + 0.02 * rng.standard_t(3, length))
        case "skewed":
            return 100 * np.exp(0.3 * normal)
        case "bimodal":
            return 100 + 8 * (rng.random(length) < 0.5) + normal
        case "outliers":
            return 100 * (1 + 0.02 * normal) * np.where(rng.random(length) < 0.02, 3, 1)
        case "correlated 0.3" | "correlated 0.6" | "correlated 0.8":
            part = float(kind.split()[1])
            series = np.zeros(length)
            for i in range(1, length):
                series[i] = part * series[i - 1] + normal[i] * (1 - part**2) ** 0.5
            return 100 * (1 + 0.02 * series)
    raise AssertionError(kind)


def findings(values: np.ndarray, **settings) -> list[tuple[int, Finding]]:
    """What a detector finds, and where."""
    detector = Detector(**{"higher_is_worse": True} | settings)
    found = [(i, detector.push(float(value))) for i, value in enumerate(values)]
    return [(i, finding) for i, finding in found if finding is not Finding.NOTHING]


@pytest.mark.parametrize(
    "kind",
    [
        *("normal", "wide", "heavy tails", "skewed", "bimodal", "outliers"),
        *("correlated 0.3", "correlated 0.6", "correlated 0.8"),
    ],
)
def test_at_most_one_false_alert_in_10_000_stationary_points(kind: str, record_property):
    num_alerts = []
    for seed in range(12):
        found = findings(noise(kind, NUM_POINTS, np.random.default_rng(1000 + seed)))
        num_alerts.append(sum(finding is Finding.WORSE for _, finding in found))
    record_property("false alerts per 10,000", sum(num_alerts) / len(num_alerts))
    assert sum(num_alerts) / len(num_alerts) <= 1
    assert max(num_alerts) <= 2


@pytest.mark.parametrize("higher_is_worse", [True, False])
def test_a_shift_of_5_percent_at_2_percent_noise_is_found_within_10_samples(
    higher_is_worse: bool, record_property
):
    delays = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        start = int(rng.integers(MIN_SAMPLES + 10, 400))
        values = noise("normal", start + 40, rng)
        values[start:] *= 1.05 if higher_is_worse else 0.95
        found = [
            i - start + 1
            for i, finding in findings(values, higher_is_worse=higher_is_worse)
            if finding is Finding.WORSE and i >= start
        ]
        delays.append(found[0] if found else 1000)
    within = sum(delay <= 10 for delay in delays) / len(delays)
    record_property("found within 10 samples", within)
    assert np.median(delays) <= 6
    assert within >= 0.99


@pytest.mark.parametrize("factor", [0.0, 1.5, 10.0, 1e6])
def test_single_outliers_raise_nothing(factor: float):
    for seed in range(20):
        values = 100 * (1 + 0.01 * np.random.default_rng(seed).standard_normal(600))
        values[100::40] *= factor
        assert not [i for i, finding in findings(values) if finding is Finding.WORSE]
    quiet = np.full(600, 100.0)
    quiet[100::40] *= factor
    assert findings(quiet) == []


def test_a_series_without_noise_alerts_from_the_least_shift_on():
    for shift, expected in ((1.02, []), (1.05, [Finding.WORSE])):
        values = np.full(200, 100.0)
        values[120:] *= shift
        assert [finding for _, finding in findings(values)] == expected


def test_what_is_no_number_is_no_sample():
    detector = Detector(higher_is_worse=True)
    for value in noise("normal", 200, np.random.default_rng(0)):
        assert detector.push(float(value)) is Finding.NOTHING
        for bad in (float("nan"), float("inf"), float("-inf")):
            assert detector.push(bad) is Finding.NOTHING
    assert detector.num_samples == 200
    assert 99 < detector.center < 101


def test_an_alarm_ends_once_it_is_as_before():
    rng = np.random.default_rng(3)
    values = noise("normal", 400, rng)
    values[250:300] *= 1.2
    (start, first), (end, second) = findings(values)
    assert (first, second) == (Finding.WORSE, Finding.RECOVERED)
    assert 250 <= start < 256
    assert 305 <= end <= 315


def test_slow_drift_is_an_alert_only_once_it_matters():
    num_alerts = 0
    for seed in range(5):
        values = noise("normal", NUM_POINTS, np.random.default_rng(seed))
        values *= np.linspace(1, 1.004, NUM_POINTS)
        num_alerts += sum(finding is Finding.WORSE for _, finding in findings(values))
    assert num_alerts <= 5
    rng = np.random.default_rng(4)
    grown = np.linspace(1, 1.2, 4000)
    worse = [i for i, f in findings(noise("normal", 4000, rng) * grown) if f == "worse"]
    assert worse and 0.01 < grown[worse[0]] - 1 < 0.07


def test_better_is_noted_and_becomes_the_baseline_where_it_stays():
    rng = np.random.default_rng(5)
    values = noise("normal", 900, rng)
    values[300:] *= 0.8
    values[800:] *= 1.1  # still better than at first, but worse than what had become normal
    found = findings(values, baseline_samples=100)
    assert [finding for _, finding in found] == [
        Finding.BETTER,
        Finding.REBASED,
        Finding.WORSE,
    ]
    assert found[0][0] < 310 and found[1][0] < 420 and 800 <= found[2][0] < 810


def test_better_for_a_while_changes_nothing():
    rng = np.random.default_rng(6)
    values = noise("normal", 600, rng)
    values[300:330] *= 0.8
    assert Finding.REBASED not in [finding for _, finding in findings(values)]
    assert Finding.WORSE not in [finding for _, finding in findings(values)]


def test_a_shift_while_the_baseline_still_grows_does_not_join_it():
    rng = np.random.default_rng(8)
    detector = Detector(higher_is_worse=True)
    for value in noise("normal", 60, rng):
        detector.push(float(value))
    for value in noise("normal", 200, rng):
        detector.push(float(1.1 * value))
    assert detector.alarmed
    assert detector.center < 101.5


def test_the_state_goes_on_after_a_restart():
    rng = np.random.default_rng(9)
    first = Detector(higher_is_worse=True)
    for value in noise("normal", 250, rng):
        first.push(float(value))
    second = Detector(higher_is_worse=True)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.center == first.center
    assert len(second.baseline) == len(first.baseline)
    found = [second.push(float(1.05 * value)) for value in noise("normal", 12, rng)]
    assert Finding.WORSE in found
    third = Detector(higher_is_worse=True)
    third.restore(json.loads(json.dumps(second.state())))
    assert third.alarmed  # an incident that goes on does so after a restart


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"baseline": ["x"], "alarmed": False, "shift": 0},
        {"baseline": [float("nan")], "alarmed": False, "shift": 0},
        {"baseline": None, "alarmed": False, "shift": 0},
    ],
)
def test_a_broken_state_is_refused(state):
    with pytest.raises((ValueError, TypeError, KeyError)):
        Detector(higher_is_worse=True).restore(state)


def test_a_baseline_of_zeros_shifts_without_dividing_by_them():
    values = np.zeros(100)
    values[80:] = 1.0
    assert [finding for _, finding in findings(values)] == [Finding.WORSE]
