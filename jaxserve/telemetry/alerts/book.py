"""Which incidents there are: one a cause, told once, over by itself, flapping held down.

Whoever watches something calls `on_alert` with the state of it at each evaluation, not only when it
changes. An incident opens with the first firing. It is over once its cause has not been firing for
`hold_s`; one that comes and goes faster stays one incident. Where the same cause has opened again
and again within an hour, `hold_s` counts double each time, up to MAX_HOLD_S.

After a restart the incidents that were open still are. Where nobody speaks of one within REASSERT_S
its cause is not watched any more, and it is over.

Invariants: at most one open incident a key; its notices to a receiver alternate between firing (or
worse, or a reminder) and resolved, in order.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxserve.telemetry.alerts.incident import Change, Incident, Notice, Severity

MAX_HOLD_S = 1800.0
REASSERT_S = 600.0
#: Incidents that are over and still shown.
NUM_RECENT = 100
#: How long openings of a cause are remembered, to see it flap.
_FLAPPING_S = 3600.0
#: Texts are cut to this, details to so many.
_MAX_TEXT = 500
_MAX_DETAILS = 50


class OnAlert(Protocol):
    """How a part says that something is wrong, or no longer."""

    def __call__(
        self,
        key: str,
        firing: bool,
        severity: str,
        title: str,
        details: Mapping[str, str] | None = None,
    ) -> None:
        """Says how a cause is at the moment; see `Book.on_alert`."""
        ...


@dataclass(kw_only=True)
class _Open:
    """An incident that is not over. Times are of the monotonic clock."""

    incident: Incident
    fired_s: float
    told_s: float
    hold_s: float
    calm: bool = False  # it is not firing at the moment
    said: bool = True  # somebody has spoken of it in this life of the process
    told: Severity = field(default=Severity.INFO)  # the worst that was


class Book:
    """All incidents.

    Args:
        tell: has all receivers told, which is none of the book's business how.
        monotonic, wall: clocks, in seconds.
        hold_s: how long a cause must be calm before its incident is over.
        resend_s: reminders of what goes on; 0 for none.
    """

    def __init__(
        self,
        tell: Callable[[Notice], None],
        *,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        hold_s: float,
        resend_s: float = 0.0,
    ) -> None:
        self.changed = False
        self._tell = tell
        self._monotonic = monotonic
        self._wall = wall
        self._hold_s = hold_s
        self._resend_s = resend_s
        self._open: dict[str, _Open] = {}
        self._recent: deque[Incident] = deque(maxlen=NUM_RECENT)
        self._openings: dict[str, list[float]] = {}

    @property
    def open(self) -> list[Incident]:
        """Incidents that are not over, the oldest first."""
        return [entry.incident for entry in self._open.values()]

    @property
    def recent(self) -> list[Incident]:
        """Incidents that are over, the newest first."""
        return list(self._recent)[::-1]

    def on_alert(
        self,
        key: str,
        firing: bool,
        severity: str,
        title: str,
        details: Mapping[str, str] | None = None,
    ) -> None:
        """Says how a cause is at the moment.

        Args:
            key: of the cause: a few words, the same each time; no secret.
            firing: whether it is wrong. The rest only matters then.
            severity: "info", "warning", "error" or "critical"; an incident's is the worst of its
                life, and worse than before is told again.
            details: figures; what was said last is kept.
        """
        now_s = self._monotonic()
        entry = self._open.get(key)
        if entry is None:
            if firing:
                self._begin(key, Severity(severity), title, _texts(details), now_s)
            return
        entry.said = True
        if not firing:
            if not entry.calm:
                entry.calm, entry.fired_s = True, now_s
            return
        entry.calm, entry.fired_s = False, now_s
        worst = max(Severity(severity), entry.incident.severity, key=lambda s: s.rank)
        incident = dataclasses.replace(
            entry.incident, severity=worst, title=title[:_MAX_TEXT], details=_texts(details)
        )
        if incident != entry.incident:
            entry.incident = incident
            self.changed = True
        if worst.rank > entry.told.rank:
            self._say(entry, Change.FIRING, now_s)

    def tick(self) -> None:
        """Ends what is over, and reminds of what is not; call about once a second."""
        now_s = self._monotonic()
        for key, entry in list(self._open.items()):
            patience_s = entry.hold_s if entry.calm else REASSERT_S
            if (entry.calm or not entry.said) and now_s - entry.fired_s >= patience_s:
                self._end(key, entry)
            elif self._resend_s and now_s - entry.told_s >= self._resend_s:
                self._say(entry, Change.REMINDER, now_s)

    def state(self) -> dict[str, Any]:
        """What outlives the process."""
        return {
            "open": [entry.incident.to_json() for entry in self._open.values()],
            "recent": [incident.to_json() for incident in self._recent],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`; raises ValueError, TypeError or KeyError where it is none."""
        now_s = self._monotonic()
        opened: Sequence[Incident] = [Incident.from_json(value) for value in state["open"]]
        self._recent.extend(Incident.from_json(value) for value in state["recent"])
        for incident in opened:
            self._open[incident.key] = _Open(
                incident=incident,
                fired_s=now_s,
                told_s=now_s,
                hold_s=self._hold_s,
                said=False,
                told=incident.severity,
            )

    def _begin(
        self, key: str, severity: Severity, title: str, details: dict[str, str], now_s: float
    ) -> None:
        times = [at for at in self._openings.get(key, ()) if now_s - at < _FLAPPING_S]
        self._openings[key] = [*times, now_s]
        incident = Incident(
            key=key,
            severity=severity,
            title=title[:_MAX_TEXT],
            details=details,
            started_s=self._wall(),
        )
        entry = self._open[key] = _Open(
            incident=incident,
            fired_s=now_s,
            told_s=now_s,
            hold_s=min(self._hold_s * 2 ** min(len(times), 20), max(MAX_HOLD_S, self._hold_s)),
        )
        self._say(entry, Change.FIRING, now_s)

    def _end(self, key: str, entry: _Open) -> None:
        del self._open[key]
        # The wall clock may have stepped back.
        ended_s = max(self._wall(), entry.incident.started_s)
        entry.incident = dataclasses.replace(entry.incident, ended_s=ended_s)
        self._recent.append(entry.incident)
        self._say(entry, Change.RESOLVED, self._monotonic())
        for other, times in list(self._openings.items()):
            if self._monotonic() - times[-1] > _FLAPPING_S:
                del self._openings[other]

    def _say(self, entry: _Open, change: Change, now_s: float) -> None:
        entry.told_s, entry.told = now_s, entry.incident.severity
        self.changed = True
        self._tell(Notice(id=secrets.token_hex(8), change=change, incident=entry.incident))


def _texts(details: Mapping[str, str] | None) -> dict[str, str]:
    items = list((details or {}).items())[:_MAX_DETAILS]
    return {str(name)[:_MAX_TEXT]: str(value)[:_MAX_TEXT] for name, value in items}
