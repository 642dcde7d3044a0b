"""The machine's time and energy, hour by hour: what they cost, how much of it worked, what idled.

Wall time goes on whether or not there is an engine; an engine that is down idles. Steps say what
of it was busy. Lengths are of the monotonic clock, so that a wall clock that is set changes only
which hour is named, and an hour boundary splits what lies across it by time.

    hardware + energy = busy + idle, exactly;    busy = requests' costs + waste

Time is settled up to the end of the last step known, or, where none comes, up to some seconds ago:
a step that then turns out to have run longer takes back idle time that was counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal

from jaxserve.metering.entry import Line, LineKind
from jaxserve.metering.prices import SMALLEST, Prices

#: So long ago, no step that has ended is still on its way here.
LAG_S = 15.0
_HOUR_S = 3600.0


@dataclass(slots=True, kw_only=True)
class Amounts:
    """What one hour has come to since its lines were last made."""

    wall_ns: int = 0
    busy_ns: int = 0
    energy_j: float = 0.0
    busy_energy_j: float = 0.0


@dataclass(slots=True, kw_only=True)
class Interval:
    """A stretch of time that was settled.

    Attributes:
        energy_j: that the devices took, once it was measured; busy_energy_j: of it, work's.
    """

    start_ns: int
    end_ns: int
    busy_ns: int
    energy_j: float = 0.0
    busy_energy_j: float = 0.0


#: Energy of an interval in joules, and of it what was busy's.
MeasureEnergy = Callable[[Interval], tuple[float, float]]


class Hours:
    """Settles time and makes lines of it.

    Args:
        measure: the energy of an interval.
        source: of the lines (`Line.source`), unique to a life of the server.
        start_ns: from when on, CLOCK_MONOTONIC.
        state: what an observer before this one had come to, of the same source; None at first.
    """

    def __init__(
        self,
        prices: Prices,
        measure: MeasureEnergy,
        *,
        source: str,
        start_ns: int,
        state: dict | None = None,
    ) -> None:
        state = state or {}
        self._prices = prices
        self._measure = measure
        self._source = source
        self.settled_ns: int = state.get("settled_ns", start_ns)
        self._resumed_ns = self.settled_ns if state else -1
        self._number: int = state.get("number", 0)
        self._amounts = {int(h): Amounts(**a) for h, a in state.get("amounts", {}).items()}
        self._busy_ns = 0
        self._last_ns = 0

    def step(self, at_ns: int, device_ns: int) -> None:
        """A step has ended; one that an observer before this one had counted is not counted."""
        if at_ns > self._resumed_ns:
            self._busy_ns += device_ns
            self._last_ns = max(self._last_ns, at_ns)

    def settle(self, now_ns: int, wall_s: float, *, last: bool = False) -> Interval | None:
        """Counts the time that is over; None where there is none.

        Args:
            wall_s: the wall clock at `now_ns`, seconds since 1970.
            last: no step is on its way any more.
        """
        start_ns = self.settled_ns
        lag_ns = 0 if last else int(LAG_S * 1e9)
        end_ns = min(max(self._last_ns, now_ns - lag_ns), now_ns)
        if end_ns <= start_ns:
            return None
        interval = Interval(start_ns=start_ns, end_ns=end_ns, busy_ns=self._busy_ns)
        energy_j, busy_energy_j = self._measure(interval)
        interval.energy_j, interval.busy_energy_j = energy_j, busy_energy_j
        wall_ns, busy_ns = end_ns - start_ns, self._busy_ns
        at_s = wall_s - (now_ns - start_ns) / 1e9
        done_ns = 0
        while done_ns < wall_ns:
            hour = int(at_s // _HOUR_S)
            left_ns = max(1, round(((hour + 1) * _HOUR_S - at_s) * 1e9))
            until_ns = min(wall_ns, done_ns + left_ns)
            amounts = self._amounts.setdefault(hour, Amounts())
            part = (until_ns - done_ns) / wall_ns
            amounts.wall_ns += until_ns - done_ns
            amounts.busy_ns += busy_ns * until_ns // wall_ns - busy_ns * done_ns // wall_ns
            amounts.energy_j += energy_j * part
            amounts.busy_energy_j += busy_energy_j * part
            at_s += (until_ns - done_ns) / 1e9
            done_ns = until_ns
        self.settled_ns, self._busy_ns = end_ns, 0
        return interval

    def lines(self) -> list[Line]:
        """The lines of what was settled since they were made last."""
        lines = [
            line for hour, amounts in self._amounts.items() for line in self._lines(hour, amounts)
        ]
        self._amounts = {}
        return lines

    def state(self) -> dict:
        """For the next observer, should this one end; `settle` first."""
        amounts = {str(hour): asdict(amounts) for hour, amounts in self._amounts.items()}
        return {"settled_ns": self.settled_ns, "number": self._number, "amounts": amounts}

    def _lines(self, hour: int, amounts: Amounts) -> list[Line]:
        prices = self._prices
        hardware = prices.hardware(amounts.wall_ns)
        energy = prices.energy(amounts.energy_j)
        busy = prices.hardware(amounts.busy_ns) + prices.energy(amounts.busy_energy_j)
        idle_energy_j = amounts.energy_j - amounts.busy_energy_j

        def line(kind: LineKind, cost: Decimal, duration_ns: int, energy_j: float) -> Line:
            self._number += 1
            return Line(
                source=self._source,
                number=self._number,
                hour=hour,
                kind=kind,
                duration_ns=duration_ns,
                energy_j=energy_j,
                carbon_g=energy_j * prices.carbon_g_per_j,
                cost=cost.quantize(SMALLEST),
            )

        return [
            line(LineKind.HARDWARE, hardware, amounts.wall_ns, 0.0),
            line(LineKind.ENERGY, energy, amounts.wall_ns, amounts.energy_j),
            line(LineKind.BUSY, busy, amounts.busy_ns, amounts.busy_energy_j),
            line(
                LineKind.IDLE,
                hardware + energy - busy,
                amounts.wall_ns - amounts.busy_ns,
                idle_energy_j,
            ),
        ]
