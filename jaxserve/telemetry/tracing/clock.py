"""From CLOCK_MONOTONIC to the wall clock: one offset for all that is told at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable

#: The two clocks are slewed together: what differs by more is a step of the wall clock.
_STEP_NS = 50_000_000


class WallClock:
    """The offset of the wall clock, as it was when it was last looked at.

    A request's spans are made at one time with one offset, so that a step of the wall clock, while
    it ran or after, changes neither their order nor their lengths; those of later requests follow.

    Args:
        monotonic_ns, wall_ns: the clocks.
    """

    def __init__(
        self,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._wall_ns = wall_ns
        self.offset_ns = self._measure()

    def refresh(self) -> bool:
        """Follows a step of the wall clock; whether there was one."""
        offset_ns = self._measure()
        if abs(offset_ns - self.offset_ns) < _STEP_NS:
            return False
        self.offset_ns = offset_ns
        return True

    def _measure(self) -> int:
        """The wall clock's time when the other one's was 0."""
        before_ns = self._monotonic_ns()
        wall_ns = self._wall_ns()
        return wall_ns - (before_ns + self._monotonic_ns()) // 2
