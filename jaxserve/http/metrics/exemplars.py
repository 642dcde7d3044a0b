"""One traced request for each bucket of a latency: from a slow bucket on a chart to its trace.

Of this process's own requests, and only of those whose trace is kept however they end. Told in
OpenMetrics alone, which knows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exemplar:
    """The last one of a bucket.

    Attributes:
        value: that was observed. at_s: when, Unix time.
    """

    trace_id: str
    value: float
    at_s: float


class Exemplars:
    """By a histogram's first cell, and the number of the bucket as it is counted."""

    def __init__(self, wall_s: Callable[[], float] = time.time) -> None:
        self._wall_s = wall_s
        self._kept: dict[int, dict[int, Exemplar]] = {}

    def keep(self, first: int, bucket: int, trace_id: str, value: float) -> None:
        """A request of a trace that is kept was counted there."""
        kept = self._kept.setdefault(first, {})
        kept[bucket] = Exemplar(trace_id, value, self._wall_s())

    def shown(self, first: int, last: Sequence[int]) -> list[Exemplar | None]:
        """For each bucket that is shown the newest of its counted ones; none where none is kept.

        Args:
            last: of each but the open one, the last of its counted buckets.
        """
        kept = self._kept.get(first)
        if not kept:
            return []
        found, begin = [], 0
        for end in (*last, max(kept)):
            inside = [kept[bucket] for bucket in range(begin, end + 1) if bucket in kept]
            found.append(max(inside, key=lambda one: one.at_s, default=None))
            begin = end + 1
        return found
