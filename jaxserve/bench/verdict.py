"""Whether a figure changed, by its repeats: effect, interval, significance.

A figure is worse if its median is, by more than `threshold`, and a permutation test of the mean
logarithm says that such a difference does not come by chance (p ≤ alpha, after Holm's correction
for the number of figures that are judged: Holm 1979). The interval of the ratio of medians is a
bootstrap's (Efron 1979). Runs that were measured in turns are compared pair by pair instead, which
takes out what drifted.
"""

from __future__ import annotations

import enum
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxserve.bench import stats

#: Repeats on each side, at least.
MIN_REPEATS = 3
#: Regroupings that are all looked at; beyond it so many by chance.
NUM_REGROUPINGS = 20_000


class Verdict(enum.StrEnum):
    """What is said of a figure."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"  # its interval lies within the threshold
    UNSURE = "unsure"  # neither: more repeats would tell
    UNJUDGED = "unjudged"  # too few repeats, or nobody said which direction is good


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one side.

    Attributes:
        samples: its value in each repeat.
        higher_is_better: None where nobody can say.
    """

    samples: list[float]
    higher_is_better: bool | None

    @property
    def value(self) -> float:
        """Median of the repeats."""
        return stats.median(self.samples)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of both.

    Attributes:
        ratio: of the medians, after to before; infinite where it was 0.
        low, high: its 95% interval, NaN where there are too few repeats, or it is of nothing.
        p_value: corrected; NaN where it was not judged.
    """

    name: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    p_value: float
    verdict: Verdict


def judge(
    before: Mapping[str, Figure],
    after: Mapping[str, Figure],
    *,
    threshold: float,
    alpha: float,
    paired: bool = False,
) -> list[Comparison]:
    """Compares every figure that both sides have.

    Args:
        threshold: part of a figure that is the least change that matters.
        alpha: chance of a verdict worse or better where nothing has changed at all.
        paired: the i-th repeats of both sides were measured one after the other.
    """
    compared = []
    for name, old in before.items():
        new = after.get(name)
        if new is None or not math.isfinite(old.value * new.value):
            continue
        if old.value or new.value:
            compared.append(_compare(name, old, new, paired))
    judged = sorted((c for c in compared if c.p_value == c.p_value), key=lambda c: c.p_value)
    corrected: dict[str, float] = {}
    least = 0.0
    for place, comparison in enumerate(judged):
        least = max(least, min(1.0, comparison.p_value * (len(judged) - place)))
        corrected[comparison.name] = least
    return [
        _decided(replace(c, p_value=corrected[c.name]), before[c.name], threshold, alpha)
        if c.name in corrected
        else c
        for c in compared
    ]


def regrouping_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided: how often samples that were dealt out by chance differ as much as these do."""
    pool = [*before, *after]
    size, total = len(after), math.fsum(pool)
    observed = abs(math.fsum(after) - size * total / len(pool))
    groups: Sequence[Sequence[int]] | itertools.combinations[tuple[int, ...]]
    if math.comb(len(pool), size) <= NUM_REGROUPINGS:
        groups = itertools.combinations(range(len(pool)), size)
        extra = 0
    else:
        chance = random.Random(0)
        places = range(len(pool))
        groups = [chance.sample(places, size) for _ in range(NUM_REGROUPINGS)]
        extra = 1  # what was observed is one of all
    num_groups = num_extreme = extra
    for group in groups:
        num_groups += 1
        difference = abs(math.fsum(pool[i] for i in group) - size * total / len(pool))
        num_extreme += difference >= observed * (1 - 1e-12)
    return num_extreme / num_groups


def sign_p_value(differences: Sequence[float]) -> float:
    """Two-sided: how often differences whose signs were dealt out by chance add up to as much."""
    observed = abs(math.fsum(differences))
    if 2 ** len(differences) <= NUM_REGROUPINGS:
        signs = list(itertools.product((1, -1), repeat=len(differences)))
        extra = 0
    else:
        chance = random.Random(0)
        signs = [[chance.choice((1, -1)) for _ in differences] for _ in range(NUM_REGROUPINGS)]
        extra = 1
    num_extreme = extra + sum(
        abs(math.fsum(s * d for s, d in zip(row, differences, strict=True)))
        >= observed * (1 - 1e-12)
        for row in signs
    )
    return num_extreme / (len(signs) + extra)


def _compare(name: str, old: Figure, new: Figure, paired: bool) -> Comparison:
    low = high = p_value = math.nan
    enough = min(len(old.samples), len(new.samples)) >= MIN_REPEATS
    samples = [*old.samples, *new.samples]
    if enough and all(0 < value < math.inf for value in samples):
        before, after = ([math.log(v) for v in figure.samples] for figure in (old, new))
        if paired and len(before) == len(after):
            _, low, high = stats.ratio_interval(new.samples, old.samples)
            p_value = sign_p_value([b - a for a, b in zip(before, after, strict=True)])
        else:
            low, high = _interval(old.samples, new.samples)
            p_value = regrouping_p_value(before, after)
    elif enough and not (old.value and new.value) and all(0 <= v < math.inf for v in samples):
        # Something became nothing, or the other way round: 0 has no logarithm.
        p_value = regrouping_p_value(old.samples, new.samples)
    if old.higher_is_better is None:
        p_value = math.nan
    return Comparison(
        name=name,
        before=old.value,
        after=new.value,
        ratio=new.value / old.value if old.value else math.inf,
        low=low,
        high=high,
        p_value=p_value,
        verdict=Verdict.UNJUDGED,
    )


def _interval(
    old: Sequence[float], new: Sequence[float], num_resamples: int = 2000
) -> tuple[float, float]:
    chance = random.Random(0)
    ratios = [
        stats.median(chance.choices(new, k=len(new)))
        / stats.median(chance.choices(old, k=len(old)))
        for _ in range(num_resamples)
    ]
    return stats.percentile(ratios, 2.5), stats.percentile(ratios, 97.5)


def _decided(c: Comparison, figure: Figure, threshold: float, alpha: float) -> Comparison:
    grown = c.ratio > 1
    if c.p_value <= alpha and abs(c.ratio - 1) >= threshold:
        verdict = Verdict.BETTER if grown == figure.higher_is_better else Verdict.WORSE
    elif c.low >= 1 - threshold and c.high <= 1 + threshold:
        verdict = Verdict.SAME
    else:
        verdict = Verdict.UNSURE
    return replace(c, verdict=verdict)
