"""What the last seconds brought, for rates that are told as they are now.

Cells of seconds in a ring, each with the second that it is of, so that old ones need no clearing
and a server without traffic tells 0. CLOCK_MONOTONIC is one for all processes of a machine, so any
worker reads what worker 0 wrote.
"""

from __future__ import annotations

from jaxserve.http.metrics.cells import Cells

#: Whole seconds that a rate is over.
WINDOW_S = 10
_SLOTS = 16
_NAME = "window"


class Window:
    """FLOPs and bytes of the last seconds."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._own = cells.own
        self._first = cells.claim(_NAME, (), 3 * _SLOTS)

    def add(self, now_ns: int, flops: float, num_bytes: float) -> None:
        """A step has ended; one worker of all says so."""
        second = now_ns // 1_000_000_000
        own, at = self._own, self._first + 3 * (second % _SLOTS)
        if own[at] != second:
            own[at], own[at + 1], own[at + 2] = second, 0.0, 0.0
        own[at + 1] += flops
        own[at + 2] += num_bytes

    def rates(self, now_ns: int) -> tuple[float, float]:
        """FLOPs and bytes a second, over the last `WINDOW_S` whole seconds."""
        second = now_ns // 1_000_000_000
        (series,) = self._cells.series(_NAME)
        cells = self._cells.totals(series)
        flops = num_bytes = 0.0
        for at in range(0, len(cells), 3):
            if second - WINDOW_S <= cells[at] < second:
                flops += cells[at + 1]
                num_bytes += cells[at + 2]
        return flops / WINDOW_S, num_bytes / WINDOW_S
