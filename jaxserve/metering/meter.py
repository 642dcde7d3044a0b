"""The machine's meter: hours and power together, and the rate that follows from them.

The rate is told to the workers and prices requests while they run, so it is a forecast of the power
at work; what it was wrong by is carried into the next one. So what requests are charged for energy
adds up to what their work took, though no request was charged the power of its own moment.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

from jaxserve.metering.entry import ZERO, Line, LineKind
from jaxserve.metering.hours import Hours, Interval
from jaxserve.metering.power.power import Power
from jaxserve.metering.prices import Prices
from jaxserve.metering.pricing import Rate

logger = logging.getLogger(__name__)

#: Time at work over which the rate is an average.
HORIZON_S = 30.0
#: Between two sets of lines of one hour.
LINES_S = 10.0


class Meter:
    """See the module.

    Args:
        source: unique to a life of the server. Lines get one that is made of it anew wherever
            nothing is known of those before, so that none counts as one of them; see `Hours`.
        path: of the file from which an observer goes on, should the one before it end.
        now_ns: CLOCK_MONOTONIC.

    Attributes:
        rate: of now.
        busy_cost, idle_cost: of the time that was settled by this observer.
    """

    def __init__(
        self, prices: Prices, power: Power, *, source: str, path: Path, now_ns: int
    ) -> None:
        self.power = power
        self.rate = Rate(prices=prices, watts=power.busy_w)
        self.busy_cost = self.idle_cost = ZERO
        self._path = path
        self._life = source
        self._source = f"{source}-{secrets.token_hex(4)}"  # unless it goes on with another's
        self._average_w: float | None = None
        self._owed_j = 0.0  # taken by work, beyond what was charged for it
        try:
            self._go_on(_load(path, source), now_ns)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged, the meter begins anew: %r", path, error)
            self._go_on({}, now_ns)
        self._made_ns = now_ns

    def _go_on(self, saved: dict, now_ns: int) -> None:
        """Begins where the observer before this one ended."""
        prices, source = self.rate.prices, saved.get("source", self._source)
        self._hours = Hours(
            prices,
            self._measure,
            source=source,
            start_ns=now_ns,
            state=saved.get("hours"),
        )
        self._unkept = [_line_from(fields) for fields in saved.get("lines", [])]
        if "before" in saved:  # of a server that ended before it had made them
            before, life = saved["before"]
            hours = Hours(prices, self._measure, source=life, start_ns=now_ns, state=before)
            self._unkept += hours.lines()
        self._source = source

    def step(self, at_ns: int, device_ns: int) -> None:
        """A device call has ended."""
        self._hours.step(at_ns, device_ns)

    def tick(self, now_ns: int, wall_s: float, *, last: bool = False) -> Interval | None:
        """Reads the power and settles what is over; about once a second, and at the end."""
        self.power.read(now_ns)
        interval = self._hours.settle(now_ns, wall_s, last=last)
        if interval is not None:
            prices = self.rate.prices
            busy = prices.hardware(interval.busy_ns) + prices.energy(interval.busy_energy_j)
            wall_ns = interval.end_ns - interval.start_ns
            self.busy_cost += busy
            self.idle_cost += prices.hardware(wall_ns) + prices.energy(interval.energy_j) - busy
        return interval

    def save(self, now_ns: int, *, last: bool = False) -> list[Line]:
        """Makes durable what was settled; the lines that are to be kept, some perhaps again.

        Args:
            last: the server ends.

        Raises:
            OSError: the file cannot be written; the lines are given again.
        """
        # None beside those that wait for a ledger that is away: what follows adds up by the hour,
        # so that however long that takes, this stays as small as it is.
        is_due = now_ns - self._made_ns >= LINES_S * 1e9 and not self._unkept
        if last or is_due:
            self._made_ns = now_ns
            self._unkept += self._hours.lines()
        _save(self._path, (self._life, self._source), self._hours.state(), self._unkept)
        return list(self._unkept)

    def kept(self, lines: Sequence[Line]) -> None:
        """These lines are in the ledger."""
        del self._unkept[: len(lines)]

    def _measure(self, interval: Interval) -> tuple[float, float]:
        """The energy of an interval, from which the next rate is learnt."""
        energy_j, busy_energy_j = self.power.measure(interval)
        busy_s = interval.busy_ns / 1e9
        if busy_s > 0:
            watts = busy_energy_j / busy_s
            if self._average_w is None:
                self._average_w = watts
            self._average_w += min(busy_s / HORIZON_S, 1.0) * (watts - self._average_w)
            self._owed_j += busy_energy_j - self.rate.watts * busy_s
            told_w = max(self._average_w + self._owed_j / HORIZON_S, 0.0)
            self.rate = Rate(prices=self.rate.prices, watts=told_w)
        return energy_j, busy_energy_j


def _load(path: Path, life: str) -> dict:
    """What an observer of the same life of the server has left; empty where none has."""
    try:
        saved = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("cannot go on from %s, the meter begins anew: %s", path, error)
        return {}
    if saved["life"] == life:
        return saved
    return {"lines": saved["lines"], "before": (saved["hours"], saved["source"])}


def _save(path: Path, names: tuple[str, str], hours: dict, lines: Sequence[Line]) -> None:
    life, source = names
    document = {
        "life": life,
        "source": source,
        "hours": hours,
        "lines": [asdict(line) | {"cost": str(line.cost)} for line in lines],
    }
    written = path.with_suffix(".new")
    written.write_text(json.dumps(document))
    os.replace(written, path)


def _line_from(fields: dict) -> Line:
    return Line(**fields | {"cost": Decimal(fields["cost"]), "kind": LineKind(fields["kind"])})
