"""How often this process was started anew of late without having been told to end.

Whoever dies cannot say so; the next life reads it from the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from jaxserve.telemetry.document import Document

logger = logging.getLogger(__name__)

FILE = "observer.json"
VERSION = 1
#: Deaths within so long a time that are a loop, and how long a loop is told of after the last.
LOOP_S = 600.0
LOOP_DEATHS = 3


class Starts:
    """Counts one start; `ended` says that this life ends as it should.

    Args:
        state: directory of what outlives the process.
        wall: clock, in seconds.
    """

    def __init__(self, state: Path, wall: Callable[[], float]) -> None:
        self._document = Document(state / FILE, VERSION)
        self._wall = wall
        self._deaths_s: list[float] = []
        saved = self._document.load() or {}
        times = saved.get("deaths")
        if isinstance(times, list):
            self._deaths_s = [float(t) for t in times if isinstance(t, int | float)][-100:]
        if saved.get("alive"):
            self._deaths_s.append(wall())
        self._save(alive=True)

    def num_deaths(self) -> int:
        """Of late; the clock may have stepped either way."""
        now_s = self._wall()
        return sum(abs(now_s - at_s) < LOOP_S for at_s in self._deaths_s)

    def is_loop(self) -> bool:
        """Whether it dies again and again."""
        return self.num_deaths() >= LOOP_DEATHS

    def ended(self) -> None:
        """This life ends because it was told to."""
        self._save(alive=False)

    def _save(self, *, alive: bool) -> None:
        try:
            self._document.save({"alive": alive, "deaths": self._deaths_s[-100:]})
        except OSError as error:
            logger.warning("it cannot be kept that the observer began: %s", error.strerror or error)
