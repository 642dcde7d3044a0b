"""Quantiles of many values in little room, each within 1% of an exact one (DDSketch, VLDB 2019).

A value is counted in a bucket by its logarithm: bucket i holds values above γ^(i-1) up to γ^i, and
answers for them with the point that is 1% from either end.
"""

from __future__ import annotations

import math

#: Relative error of a quantile, at most.
ERROR = 0.01
_GAMMA = (1 + ERROR) / (1 - ERROR)
_LOG_GAMMA = math.log(_GAMMA)
#: Smaller and larger values count as these: they bound the number of buckets at about 1,700.
SMALLEST, LARGEST = 1e-6, 1e9


class Sketch:
    """Counts of values by their size.

    Attributes:
        count: values so far. total: their sum, exact.
    """

    __slots__ = ("_counts", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._counts: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Counts a value; one that is not finite, or below 0, is left out."""
        if not 0 <= value < math.inf:
            return
        index = math.ceil(math.log(min(max(value, SMALLEST), LARGEST)) / _LOG_GAMMA)
        self._counts[index] = self._counts.get(index, 0) + 1
        self.count += 1
        self.total += value

    def join(self, other: Sketch) -> None:
        """Counts all that another has."""
        for index, count in other._counts.items():
            self._counts[index] = self._counts.get(index, 0) + count
        self.count += other.count
        self.total += other.total

    def part(self, other: Sketch) -> None:
        """Takes away all that another has, which was joined before."""
        for index, count in other._counts.items():
            left = self._counts[index] - count
            if left:
                self._counts[index] = left
            else:
                del self._counts[index]
        self.count -= other.count
        self.total -= other.total

    def quantiles(self, shares: tuple[float, ...]) -> tuple[float | None, ...]:
        """The values below which such shares lie, each a value's rank ⌈share · count⌉.

        Args:
            shares: between 0 and 1, rising.

        Returns:
            None for each where nothing was counted.
        """
        if not self.count:
            return (None,) * len(shares)
        found: list[float] = []
        seen = 0
        for index in sorted(self._counts):
            seen += self._counts[index]
            while len(found) < len(shares) and seen >= max(
                1, _rank(shares[len(found)], self.count)
            ):
                found.append(2 * _GAMMA**index / (_GAMMA + 1))
        return tuple(found)


def _rank(share: float, count: int) -> int:
    return min(count, math.ceil(share * count - 1e-9))
