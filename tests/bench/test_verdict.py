"""The tests behind a verdict."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats as scipy_stats

from jaxserve.bench.verdict import Figure, Verdict, judge, regrouping_p_value, sign_p_value


def test_all_regroupings_of_few_samples():
    assert regrouping_p_value([1, 2, 3], [7, 8, 9]) == pytest.approx(2 / 20)
    assert regrouping_p_value([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert regrouping_p_value([1, 1, 1], [1, 1, 1]) == 1.0


def test_regroupings_by_chance_agree_with_students_test():
    chance = random.Random(3)
    before = [chance.gauss(0, 1) for _ in range(40)]
    after = [chance.gauss(0.5, 1) for _ in range(40)]
    expected = scipy_stats.ttest_ind(before, after).pvalue
    assert regrouping_p_value(before, after) == pytest.approx(expected, abs=0.01)


def test_signs_of_pairs():
    assert sign_p_value([1.0, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(2 / 32)
    assert sign_p_value([1.0, -1.0]) == 1.0
    assert sign_p_value([1.0] * 30) < 0.001


def test_pairs_take_out_what_drifted():
    chance = random.Random(4)
    drift = [100 * math.exp(chance.gauss(0, 0.3)) for _ in range(20)]
    before = {"x": Figure(samples=drift, higher_is_better=True)}
    after = {"x": Figure(samples=[d * 0.93 for d in drift], higher_is_better=True)}
    (alone,) = judge(before, after, threshold=0.03, alpha=0.05)
    (paired,) = judge(before, after, threshold=0.03, alpha=0.05, paired=True)
    assert alone.verdict is Verdict.UNSURE
    assert paired.verdict is Verdict.WORSE
    assert (paired.low, paired.high) == (pytest.approx(0.93), pytest.approx(0.93))


def test_p_values_are_corrected_for_their_number():
    def side(center: float, number: int) -> dict[str, Figure]:
        chance = random.Random(center)
        return {
            f"f{i}": Figure(
                samples=[center * (1 + 0.01 * chance.gauss(0, 1)) for _ in range(5)],
                higher_is_better=True,
            )
            for i in range(number)
        }

    for number, verdict in ((1, Verdict.WORSE), (40, Verdict.UNSURE)):
        compared = judge(side(100, number), side(90, number), threshold=0.03, alpha=0.05)
        assert {c.verdict for c in compared} == {verdict}


@pytest.mark.parametrize("samples", [[0.0, 1.0, 2.0], [1.0, -1.0, 2.0], [math.nan, 1.0, 1.0]])
def test_what_has_no_logarithm_is_not_judged(samples: list[float]):
    figure = {"x": Figure(samples=samples, higher_is_better=True)}
    assert all(
        c.verdict is Verdict.UNJUDGED for c in judge(figure, figure, threshold=0.03, alpha=0.05)
    )


@pytest.mark.parametrize(
    ("before", "after", "higher_is_better", "verdict"),
    [
        (100.0, 0.0, True, Verdict.WORSE),
        (0.0, 100.0, True, Verdict.BETTER),
        (0.0, 3.0, False, Verdict.WORSE),
        (3.0, 0.0, False, Verdict.BETTER),
        (3.0, 0.0, None, Verdict.UNJUDGED),
    ],
)
def test_what_became_nothing_or_came_from_it_is_judged(
    before: float, after: float, higher_is_better: bool | None, verdict: Verdict
):
    old, new = (
        {"x": Figure(samples=[value] * 5, higher_is_better=higher_is_better)}
        for value in (before, after)
    )
    (compared,) = judge(old, new, threshold=0.03, alpha=0.05)
    assert compared.verdict is verdict


def test_a_number_that_is_none_among_the_samples_is_no_evidence():
    old = {"x": Figure(samples=[100.0, 101.0, 99.0, 100.0], higher_is_better=True)}
    new = {"x": Figure(samples=[50.0, math.nan, 51.0, 49.0, 50.0], higher_is_better=True)}
    compared = judge(old, new, threshold=0.03, alpha=0.05)
    assert all(c.verdict is Verdict.UNJUDGED for c in compared)
