"""Burn rates, and the alerts that follow from them.

A burn rate of 1 uses up the error budget of a period exactly in that period. An alert looks at two
windows: the long one says that it matters, the short one that it still goes on (Google's SRE
workbook, chapter 5). Below a number of bad requests nobody is told: one error among a few requests
of a night is a high rate of next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from jaxserve.telemetry.slo.book import DAYS_S, Count, Tally
from jaxserve.telemetry.slo.objective import Objective

logger = logging.getLogger(__name__)

PAGE, TICKET = "page", "ticket"
SEVERITIES = (PAGE, TICKET)


@dataclass(frozen=True, kw_only=True)
class BurnRule:
    """When a budget burns too fast.

    Attributes:
        factor: of the burn rate that uses up the budget exactly; reached over both windows.
    """

    factor: Decimal
    long_s: int
    short_s: int
    severity: str


RULES = (
    BurnRule(factor=Decimal("14.4"), long_s=3600, short_s=300, severity=PAGE),
    BurnRule(factor=Decimal(6), long_s=6 * 3600, short_s=1800, severity=PAGE),
    BurnRule(factor=Decimal(1), long_s=DAYS_S, short_s=6 * 3600, severity=TICKET),
)
#: Windows by the names that they have in documents and metrics.
WINDOWS_S = {"5m": 300, "30m": 1800, "1h": 3600, "6h": 6 * 3600, "3d": DAYS_S}
WINDOW_NAMES = {window_s: name for name, window_s in WINDOWS_S.items()}


class OnAlert(Protocol):
    """Is told when an alert begins and when it ends."""

    def __call__(
        self, key: str, firing: bool, severity: str, title: str, details: dict[str, Any]
    ) -> None:
        """One cause has one key."""
        ...


def burn_rate(objective: Objective, count: Count) -> float:
    """How fast the budget burns; 0 where there was no traffic."""
    return count.bad / count.total / float(objective.budget) if count.total else 0.0


def is_burning(rule: BurnRule, objective: Objective, tally: Tally, min_bad: int) -> bool:
    """Whether a rule holds now."""
    share = rule.factor * objective.budget
    long, short = tally.count(rule.long_s), tally.count(rule.short_s)
    return (
        long.bad >= min_bad
        and short.bad > 0
        and long.bad >= share * long.total
        and short.bad >= share * short.total
    )


@dataclass(slots=True)
class Alerts:
    """Which alerts are on, and tells of changes.

    Args:
        min_bad: bad requests in the long window below which nobody is told.
        firing: keys of those that are on, also from before a restart.
        told: of those, which this process has told: whoever was told before a restart takes an
            alert that nobody speaks of any more to be over.
    """

    objectives: list[Objective]
    min_bad: int
    on_alert: OnAlert
    firing: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def evaluate(self, tallies: Iterable[Tally]) -> None:
        """Looks at all objectives; `tallies` are theirs, in order."""
        wanted = set()
        for objective, tally in zip(self.objectives, tallies, strict=True):
            for severity in SEVERITIES:
                key = alert_key(objective, severity)
                wanted.add(key)
                burning = [
                    rule
                    for rule in RULES
                    if rule.severity == severity
                    and is_burning(rule, objective, tally, self.min_bad)
                ]
                if bool(burning) != (key in self.firing) or (burning and key not in self.told):
                    self._turn(key, objective, severity, tally, burning)
        for key in self.firing - wanted:  # of an objective that is no more
            self.firing.discard(key)
            severity, _, name = key.removeprefix("slo ").partition(": ")
            self.on_alert(key, False, severity, f"{name}: is no objective any more", {})

    def is_firing(self, objective: Objective, severity: str) -> bool:
        """Whether it is on."""
        return alert_key(objective, severity) in self.firing

    def _turn(
        self,
        key: str,
        objective: Objective,
        severity: str,
        tally: Tally,
        burning: list[BurnRule],
    ) -> None:
        for keys in (self.firing, self.told):
            (keys.add if burning else keys.discard)(key)
        rates = {
            name: round(burn_rate(objective, tally.count(window_s)), 3)
            for name, window_s in WINDOWS_S.items()
        }
        details: dict[str, Any] = {
            "objective": objective.name,
            "burn_rates": rates,
            "overdue": tally.overdue,
            "bad": {name: tally.count(window_s).bad for name, window_s in WINDOWS_S.items()},
        }
        if not burning:
            self.on_alert(key, False, severity, f"{objective.name}: kept again", details)
            return
        windows = " and ".join(
            f"{rule.factor}x over {WINDOW_NAMES[rule.long_s]} and {WINDOW_NAMES[rule.short_s]}"
            for rule in burning
        )
        title = f"{objective.name}: the error budget burns more than {windows}"
        self.on_alert(key, True, severity, title, details)


def alert_key(objective: Objective, severity: str) -> str:
    """By which an alert is known, also after a restart."""
    return f"slo {severity}: {objective.name}"


def log_alert(key: str, firing: bool, severity: str, title: str, details: dict[str, Any]) -> None:
    """Tells of an alert where nobody else does."""
    if firing:
        logger.warning("%s: %s", severity, title)
    else:
        logger.info("resolved: %s", title)
