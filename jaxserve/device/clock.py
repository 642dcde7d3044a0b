"""When the device became free: of what stands in line on it, each call's own time.

Calls run one after the other, of whatever kind they are. A call's time begins when it was launched,
or when the call before it was done, if that was later.
"""

from __future__ import annotations

import time


class DeviceClock:
    """Shared by all that launch calls on one device and read them in the same order."""

    def __init__(self) -> None:
        self._free_ns = 0

    def collected(self, launched_ns: int) -> tuple[int, int]:
        """A call's results are here, now.

        Args:
            launched_ns: when it was launched, CLOCK_MONOTONIC.

        Returns:
            Nanoseconds that it took, and that the device had nothing to do before it.
        """
        now_ns = time.monotonic_ns()
        free_ns, self._free_ns = self._free_ns, now_ns
        idle_ns = max(0, launched_ns - free_ns) if free_ns else 0
        return now_ns - max(launched_ns, free_ns), idle_ns
