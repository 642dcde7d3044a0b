"""Where a finished series changed: offline, for the history of a benchmark's results.

    outliers clipped → optimal partition → each boundary tested, the weakest dropped, again

The partition minimises the sum over segments of the Gaussian likelihood with a mean and a variance
of its own, plus a penalty a segment (PELT: Killick, Fearnhead, Eckley 2012), so that it finds steps
and changes of spread. A boundary stays where the two segments beside it differ by rank tests, which
know no Gaussian, in their values (Mann, Whitney 1947) or in their distances from the median, and by
at least `min_shift`. The constants were chosen by simulated series, none of which is of the
benchmark that compares this with others (benchmarks/degradation.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats

#: Samples of a segment, at least.
MIN_LENGTH = 4
#: A segment's price, in units of log(length of the series).
PENALTY = 4.0
#: Standard deviations by which a sample must differ from its neighbourhood to be an outlier, and
#: how far that reaches to each side.
OUTLIER_SIGMAS = 4.0
NEIGHBOURHOOD = 7
#: Significance of a boundary.
ALPHA = 0.001
#: Least standard deviation that is believed, as a part of the typical value and of the standard
#: deviation that neighbours' differences show: a run of equal values is no segment of its own.
_LEAST_SPREAD = 0.002
_LEAST_NOISE = 0.5
#: Of a normal distribution, standard deviation to median absolute deviation.
_MAD = 1.4826
#: Mean absolute difference of two samples to standard deviation.
_DIFFERENCE = 1.1284


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change.

    Attributes:
        index: of the first sample after it.
        before, after: medians of the segments beside it.
        p_value: that they are alike.
    """

    index: int
    before: float
    after: float
    p_value: float

    @property
    def shift(self) -> float:
        """As a part of what was before; infinite where that was 0."""
        if self.before == 0.0:
            return 0.0 if self.after == 0.0 else math.copysign(math.inf, self.after)
        return (self.after - self.before) / abs(self.before)


def find_changes(
    values: Sequence[float], *, min_shift: float = 0.0, alpha: float = ALPHA
) -> list[Change]:
    """Where a series changed, in order; samples that are no finite number are passed over.

    Args:
        min_shift: smallest change of the median, as a part of it, that counts; changes of the
            spread alone only count where it is 0.
        alpha: significance of each.
    """
    given = np.asarray(values, dtype=np.float64)
    places = np.flatnonzero(np.isfinite(given))
    x = clip_outliers(given[places])
    bounds = partition(x)
    while len(bounds) > 2:
        found = [_change(x, *bounds[i : i + 3]) for i in range(len(bounds) - 2)]
        weakest = max(
            range(len(found)), key=lambda i: _weakness(found[i], min_shift, alpha)
        )  # p-value, unless it is too small a change
        if _weakness(found[weakest], min_shift, alpha) <= alpha:
            return [
                Change(
                    index=int(places[c.index]), before=c.before, after=c.after, p_value=c.p_value
                )
                for c in found
            ]
        del bounds[weakest + 1]
    return []


def clip_outliers(x: Float[ndarray, "n"]) -> Float[ndarray, "n"]:
    """The series with single samples that differ from both their sides brought back to them."""
    out = x.copy()
    if len(x) < 2:
        return out
    lows, highs, known = _side_limits(x, _LEAST_NOISE * _noise(x))
    above = known & np.all(x > highs, axis=0)
    below = known & np.all(x < lows, axis=0)
    for i in np.flatnonzero(above | below):
        around = np.concatenate(
            [x[max(0, i - NEIGHBOURHOOD) : i], x[i + 1 : i + 1 + NEIGHBOURHOOD]]
        )
        low, high = float(np.min(lows[:, i])), float(np.max(highs[:, i]))
        # A neighbour out there too makes it a change.
        beside = x[[j for j in (i - 1, i + 1) if 0 <= j < len(x)]]
        if above[i] and not np.any(beside > high):
            out[i] = min(float(np.max(around)), high)
        elif below[i] and not np.any(beside < low):
            out[i] = max(float(np.min(around)), low)
    return out


def partition(x: Float[ndarray, "n"]) -> list[int]:
    """Bounds of the best segments: 0, the first sample of each but the first, and n."""
    n = len(x)
    if n < 2 * MIN_LENGTH:
        return [0, n]
    scale = float(np.median(np.abs(x))) or float(np.max(np.abs(x))) or 1.0
    y = (x - float(np.median(x))) / scale
    sums, squares = np.zeros(n + 1), np.zeros(n + 1)
    np.cumsum(y, out=sums[1:])
    np.cumsum(y * y, out=squares[1:])
    price = PENALTY * math.log(n)
    floor = max(_LEAST_SPREAD, _LEAST_NOISE * _noise(y)) ** 2
    best = np.full(n + 1, np.inf)
    best[0] = -price
    last = np.zeros(n + 1, dtype=np.int64)
    starts = np.array([0], dtype=np.int64)
    for end in range(MIN_LENGTH, n + 1):
        lengths = end - starts
        means = (sums[end] - sums[starts]) / lengths
        variances = (squares[end] - squares[starts]) / lengths - means * means
        floored = np.maximum(variances, floor)
        costs = best[starts] + lengths * (np.log(floored) + variances / floored)
        place = int(np.argmin(costs))
        best[end] = costs[place] + price
        last[end] = starts[place]
        starts = starts[costs <= best[end]]  # what cannot be the best start any more is left out
        if (joins := end - MIN_LENGTH + 1) >= MIN_LENGTH:
            starts = np.append(starts, joins)
    bounds = [n]
    while bounds[-1]:
        bounds.append(int(last[bounds[-1]]))
    return bounds[::-1]


def _noise(x: Float[ndarray, "n"]) -> float:
    """Standard deviation that the differences of neighbours show, whatever the steps."""
    return float(np.mean(np.abs(np.diff(x)))) / _DIFFERENCE


def _side_limits(
    x: Float[ndarray, "n"], least: float
) -> tuple[Float[ndarray, "2 n"], Float[ndarray, "2 n"], Bool[ndarray, "n"]]:
    """What is usual before and after each sample: lowest and highest value of either side.

    Args:
        least: standard deviation of a side, at least.

    Returns:
        lows, highs, and whether a sample has a side at all. One of fewer than three samples is
        none: everything is above and below it.
    """
    padded = np.pad(x, NEIGHBOURHOOD, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, NEIGHBOURHOOD)
    enough = np.sum(np.isfinite(windows), axis=1) >= 3
    filled = np.where(enough[:, None], windows, 0.0)
    centers = np.nanmedian(filled, axis=1)
    spreads = _MAD * np.nanmedian(np.abs(filled - centers[:, None]), axis=1)
    reach = OUTLIER_SIGMAS * np.maximum(spreads, np.maximum(_LEAST_SPREAD * np.abs(centers), least))
    low = np.where(enough, centers - reach, np.inf)
    high = np.where(enough, centers + reach, -np.inf)
    before, after = slice(0, len(x)), slice(NEIGHBOURHOOD + 1, None)
    sides = np.stack([enough[before], enough[after]])
    return (
        np.stack([low[before], low[after]]),
        np.stack([high[before], high[after]]),
        np.any(sides, axis=0),
    )


def _change(x: Float[ndarray, "n"], start: int, index: int, end: int) -> Change:
    left, right = x[start:index], x[index:end]
    before, after = float(np.median(left)), float(np.median(right))
    p_values = [1.0]
    for a, b in ((left, right), (np.abs(left - before), np.abs(right - after))):
        if np.ptp(np.concatenate([a, b])) > 1e-12 * abs(before):
            test: Any = stats.mannwhitneyu(a, b, alternative="two-sided")
            p_values.append(float(test.pvalue))
    return Change(index=index, before=before, after=after, p_value=min(1.0, 2 * min(p_values)))


def _weakness(change: Change, min_shift: float, alpha: float) -> float:
    """Its p-value; above 1 where it is too small."""
    if min_shift and abs(change.shift) < min_shift:
        return 2.0 - abs(change.shift)
    return change.p_value
