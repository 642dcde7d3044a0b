"""Alerts about the engine's process: down, dying again and again, or given up.

All are one cause: whoever is called for a crash need not be called for the next.
"""

from __future__ import annotations

from collections import deque

from jaxserve.telemetry.alerts.book import OnAlert
from jaxserve.telemetry.alerts.incident import Severity

KEY = "engine"
#: A restart may take this long before anybody is told.
DOWN_S = 60.0
#: So many ends within so long a time are a loop.
LOOP_ENDS = 3
LOOP_S = 600.0


class EngineWatch:
    """Follows the engine's lives; times are monotonic seconds.

    Nothing is said before something was heard: an incident of the observer's life before goes on.

    Args:
        on_alert: is told at each `tick`.
    """

    def __init__(self, on_alert: OnAlert) -> None:
        self._on_alert = on_alert
        self._ends_s: deque[float] = deque(maxlen=100)
        self._down_s: float | None = None
        self._failed = ""
        self._heard = False

    def down(self, at_s: float) -> None:
        """A life of the engine has ended."""
        self._ends_s.append(at_s)
        self.away(at_s)

    def away(self, at_s: float) -> None:
        """None serves at the moment."""
        self._heard = True
        if self._down_s is None:
            self._down_s = at_s

    def ready(self) -> None:
        """The engine serves."""
        self._heard = True
        self._down_s = None
        self._failed = ""

    def failed(self, error: str, at_s: float) -> None:
        """It will not be started again, or says that it cannot go on."""
        self._failed = error or "no reason given"
        self.away(at_s)

    def tick(self, now_s: float) -> None:
        """Says how it is."""
        if not self._heard:
            return
        while self._ends_s and now_s - self._ends_s[0] > LOOP_S:
            self._ends_s.popleft()
        ends = len(self._ends_s)
        details = {f"ends within {LOOP_S:.0f} s": str(ends)}
        if self._failed:
            self._say(True, "The engine has failed", details | {"error": self._failed})
        elif self._down_s is not None and now_s - self._down_s >= DOWN_S:
            down = {"down for": f"{now_s - self._down_s:.0f} s"}
            self._say(True, "The engine is down", details | down)
        elif self._down_s is None or ends >= LOOP_ENDS:  # else it cannot be said yet
            self._say(ends >= LOOP_ENDS, "The engine ends and is started again and again", details)

    def _say(self, firing: bool, title: str, details: dict[str, str]) -> None:
        self._on_alert(KEY, firing, Severity.CRITICAL, title, details)
