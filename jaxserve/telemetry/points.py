"""Seconds and minutes, what was counted in each, and the columns that a chart draws of them.

They are kept in rings, so that memory is bounded.

Invariants: a number that nothing was measured for is None, never NaN and never 0; a rate is 0 only
for a time in which the engine was seen doing nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.telemetry.sketch import Sketch

_SHARES = (0.5, 0.95, 0.99)
_LATENCIES = ("ttft", "tpot", "total")
_GAUGES = ("running", "waiting", "pages_used", "pages_cached", "pages_total")
#: Columns of counts, which are given a second.
_RATES = (
    *("requests", "bad", "limited", "refused", "left"),
    *("prefill_tokens", "decode_tokens", "steps", "flops", "bytes"),
)


@dataclass(slots=True)
class Point:
    """One second or minute.

    Attributes:
        at: its number: of seconds or minutes of the monotonic clock.
        gauges: the most that was seen, by name.
    """

    at: int
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_RATES, 0))
    latencies: dict[str, Sketch] = field(
        default_factory=lambda: {name: Sketch() for name in _LATENCIES}
    )
    gauges: dict[str, int] = field(default_factory=dict)
    device_ns: int = 0
    idle_ns: int = 0
    rows: int = 0

    def gauge(self, values: EngineStatus | StepStats) -> None:
        """What was seen of queue and pages."""
        gauges = self.gauges
        for name in _GAUGES:
            value = getattr(values, name)
            if value > gauges.get(name, -1):
                gauges[name] = value


class Ring:
    """The last points, by number.

    Args:
        step_s: of a point. size: points.
    """

    def __init__(self, step_s: int, size: int) -> None:
        self.step_s = step_s
        self.size = size
        self._step_ns = step_s * 1_000_000_000
        self._points: list[Point | None] = [None] * size
        self._newest = -1

    def number(self, at_ns: int) -> int:
        """The point's that a time belongs to."""
        return at_ns // self._step_ns

    def at(self, at_ns: int) -> Point | None:
        """The point of a time; None where that is longer ago than the ring."""
        number = self.number(at_ns)
        if number <= self._newest - self.size:
            return None
        self._newest = max(self._newest, number)
        point = self._points[number % self.size]
        if point is None or point.at != number:
            point = self._points[number % self.size] = Point(number)
        return point

    def find(self, number: int) -> Point | None:
        """The point of a number, if anything was counted there."""
        point = self._points[number % self.size]
        return point if point is not None and point.at == number else None


class Window:
    """Latencies of the last points, one after another.

    Args:
        size: points.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._points: deque[Point | None] = deque()
        self._sums = {name: Sketch() for name in _LATENCIES}

    def take(self, point: Point | None) -> None:
        """Goes on to the next point; None where nothing was counted in it."""
        self._points.append(point)
        gone = self._points.popleft() if len(self._points) > self._size else None
        for name, own in self._sums.items():
            if point is not None:
                own.join(point.latencies[name])
            if gone is not None:
                own.part(gone.latencies[name])

    def quantiles(self) -> dict[str, float | None]:
        """Of what is in the window, by the names of their columns."""
        return {
            f"{name}_p{share * 100:g}": None if value is None else round(value, 3)
            for name, own in self._sums.items()
            for share, value in zip(_SHARES, own.quantiles(_SHARES), strict=True)
        }


def columns_of(point: Point | None, gauges: dict[str, int], elapsed_s: float) -> dict[str, Any]:
    """A point's columns, all but its quantiles.

    Args:
        point: None where nothing was counted in it.
        gauges: what is taken to have been seen of queue and pages.
        elapsed_s: how much of its time has been watched.
    """
    point = point or Point(-1)
    values: dict[str, Any] = {}
    for name in _RATES:
        values[name] = round(point.counts[name] / elapsed_s, 3) if elapsed_s > 0 else None
    for name in _GAUGES:
        values[name] = gauges.get(name)
    steps = point.counts["steps"]
    values["step_ms"] = round(point.device_ns / steps / 1e6, 3) if steps else None
    values["rows"] = round(point.rows / steps, 2) if steps else None
    seen_ns = point.device_ns + point.idle_ns
    busy = point.device_ns / (elapsed_s * 1e9) if elapsed_s > 0 else 0.0
    values["busy"] = round(min(1.0, busy), 4) if seen_ns or gauges else None
    return values
