"""All of the SLOs in one object: takes what happens, says how it stands, outlives its process.

Driven by the observer (`http.observer.slo`): requests as they begin and end, a tick a second, and
a flush some times a minute. Clocks are arguments, so that a test may live through 28 days.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from jaxserve.config import SloConfig
from jaxserve.protocol.records import Begun, FirstToken, RequestRecord
from jaxserve.telemetry.slo.book import Book, Tally
from jaxserve.telemetry.slo.burn import Alerts, OnAlert, log_alert
from jaxserve.telemetry.slo.objective import Objective, parse_objectives
from jaxserve.telemetry.slo.state import StateFile, restore_book, return_snapshot, take_snapshot
from jaxserve.telemetry.slo.timeline import Timeline, read_boot

#: After a start nothing is called overdue for so long: what workers have to say comes first.
SETTLING_S = 10.0
#: By then workers have sent again what was counted before a restart.
_AGAIN_S = 3600.0


class Compliance:
    """See the module.

    Args:
        directory: where its file is kept.
        max_again: requests that workers may send again after a restart.
        life: names the server's run; requests end with it.
        on_alert: is told when an alert begins and ends.
        monotonic_ns, wall_s: the clocks.
        boot: which boot of the machine this is; as the system says where None.

    Attributes:
        started_ns: when it began.

    Raises:
        ConfigError: an objective cannot be read.
    """

    def __init__(
        self,
        config: SloConfig,
        directory: Path,
        *,
        max_again: int = 200_000,
        life: str = "",
        on_alert: OnAlert = log_alert,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_s: Callable[[], float] = time.time,
        boot: str | None = None,
    ) -> None:
        self.objectives = parse_objectives(config.objectives)
        self.started_ns = monotonic_ns()
        self.book = Book(self.objectives, int(config.overdue_s * 1e9))
        self.file = StateFile(directory, max_again)
        self.alerts = Alerts(self.objectives, config.min_bad_events, on_alert)
        self._life = life
        self._monotonic_ns = monotonic_ns
        saved = self.file.load()
        boot = read_boot() if boot is None else boot
        last = saved.instant if saved is not None else None
        self.timeline = Timeline(self.started_ns, wall_s(), boot, last)
        if saved is not None:
            restore_book(self.book, saved, life, self.timeline.at_s(self.started_ns))
            self.alerts.firing = set(saved.firing)
        self.tick()

    @property
    def now_s(self) -> float:
        """On the timeline."""
        return self.timeline.at_s(self._monotonic_ns())

    @property
    def uptime_s(self) -> float:
        """Since it began."""
        return (self._monotonic_ns() - self.started_ns) / 1e9

    def tallies(self) -> list[Tally]:
        """Of the objectives, in order."""
        return [self.book.tally(objective) for objective in self.objectives]

    def by_objective(self) -> list[tuple[Objective, Tally]]:
        """Both."""
        return list(zip(self.objectives, self.tallies(), strict=True))

    # ------------------------------------------------------------------ what happens

    def begun(self, begun: Begun) -> None:
        """A request has arrived."""
        self.book.begun(begun)

    def first_token(self, first: FirstToken) -> None:
        """It has its first token."""
        self.book.first_token(first)

    def ended(self, record: RequestRecord) -> None:
        """A request has ended."""
        done_ns = min(record.done_ns, self._monotonic_ns())
        self.book.ended(record, self.timeline.at_s(done_ns))

    def tick(self) -> None:
        """About once a second: what is overdue, and which alerts begin or end."""
        now_ns = self._monotonic_ns()
        self.book.advance(self.timeline.at_s(now_ns), now_ns)
        if self.uptime_s < SETTLING_S:
            for tally in self.tallies():
                tally.overdue = 0
            return
        if self.uptime_s > _AGAIN_S:
            self.book.restored(frozenset())
        self.alerts.evaluate(self.tallies())

    async def flush(self) -> None:
        """Keeps what was counted; where that fails it is noted, and tried again the next time."""
        instant = self.timeline.instant(self._monotonic_ns())
        snapshot = take_snapshot(self.book, instant, self._life, self.alerts.firing)
        try:
            await asyncio.to_thread(self.file.write, snapshot)
        except sqlite3.Error as error:
            return_snapshot(self.book, snapshot)
            self.file.note(error)
        except asyncio.CancelledError:  # it may have been written: to write it again is harmless
            return_snapshot(self.book, snapshot)
            raise
        else:
            self.file.note(None)

    def close(self) -> None:
        """Lets go of its file."""
        self.file.close()
