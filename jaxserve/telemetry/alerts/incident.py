"""What an alert is about, and what is told of it."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from typing import Any, Self


class Severity(enum.StrEnum):
    """How bad it is; PagerDuty's words."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """Larger is worse."""
        return list(Severity).index(self)


class Change(enum.StrEnum):
    """What a notice says of its incident."""

    FIRING = "firing"  # it has begun, or is worse than was told
    RESOLVED = "resolved"
    REMINDER = "reminder"  # it goes on


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One cause, from when it was seen to when it was over.

    Attributes:
        key: of the cause; an incident that is open has it for itself.
        details: figures and names for whoever reads it, as text.
        started_s, ended_s: wall clock, seconds; ended_s is 0 while it is open.
    """

    key: str
    severity: Severity
    title: str
    details: dict[str, str]
    started_s: float
    ended_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The other way; raises ValueError, TypeError or KeyError where it is none."""
        return cls(
            key=str(value["key"]),
            severity=Severity(value["severity"]),
            title=str(value["title"]),
            details=dict(value["details"]),
            started_s=float(value["started_s"]),
            ended_s=float(value["ended_s"]),
        )


@dataclass(kw_only=True)
class Notice:
    """What one receiver is still to be told.

    Attributes:
        id: the same however often it is sent.
        attempts: that failed, so far.
    """

    id: str
    change: Change
    incident: Incident
    attempts: int = field(default=0)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"id": self.id, "change": self.change, "incident": self.incident.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The other way; raises ValueError, TypeError or KeyError where it is none."""
        return cls(
            id=str(value["id"]),
            change=Change(value["change"]),
            incident=Incident.from_json(value["incident"]),
        )
