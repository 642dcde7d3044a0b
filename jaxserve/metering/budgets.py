"""Monthly budgets of tenants, and what each has spent of its own.

A month is the calendar's, in UTC. Totals come from the ledger, again and again, and what is priced
between is counted on: so they are right again soon after the observer was started anew, or where
several servers share a ledger. Past the soft limit a tenant is told, past the hard one refused; by
how much it is overrun depends on how late costs are known (docs/cost.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.metering.entry import ZERO


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Of one tenant, a month, in the configured currency; None where there is no such limit."""

    soft: Decimal | None = None
    hard: Decimal | None = None


#: Told when a tenant passes a limit, and when a month begins in which it has not: tenant, "soft" or
#: "hard", whether it is passed, what was spent, the limit.
OnPassed = Callable[[str, str, bool, Decimal, Decimal], None]


def read_budget(where: str, value: Any) -> Budget | None:
    """A budget as the key file has it: `{soft: 100, hard: 120}`, one of them at least.

    Raises:
        ConfigError: names the row.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or not value or not value.keys() <= {"soft", "hard"}:
        raise ConfigError(f"{where} must be a mapping of soft, hard or both, got {value!r}")
    limits = {name: _amount(f"{where}: {name}", amount) for name, amount in value.items()}
    budget = Budget(**limits)
    if budget.soft is not None and budget.hard is not None and budget.soft > budget.hard:
        raise ConfigError(f"{where}: soft is {budget.soft}, above hard, {budget.hard}")
    return budget


def month_of(at_s: float) -> str:
    """The month of a moment, as 2026-11."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m")


def end_of(month: str) -> datetime:
    """When a month is over."""
    year, number = map(int, month.split("-"))
    return datetime(year + number // 12, number % 12 + 1, 1, tzinfo=UTC)


class Spending:
    """What tenants with budgets have spent in the month that runs.

    Args:
        budgets: by tenant.
        on_passed: called once for each limit that is passed in a month, and once that is over.
    """

    def __init__(self, budgets: Mapping[str, Budget], on_passed: OnPassed | None = None) -> None:
        self.budgets = dict(budgets)
        self.month = ""
        self._spent: dict[str, Decimal] = {}
        self._on_passed = on_passed
        self._passed: set[tuple[str, str]] = set()

    def spent(self, tenant: str) -> Decimal:
        """So far this month."""
        return self._spent.get(tenant, ZERO)

    def begin(self, month: str, totals: Mapping[str, Decimal]) -> None:
        """Goes on from what the ledger says."""
        before = self._passed if month != self.month else set()
        if month != self.month:
            self._passed = set()
        self.month = month
        self._spent = {tenant: totals.get(tenant, ZERO) for tenant in self.budgets}
        for tenant in self.budgets:
            self._look(tenant)
        for tenant, name in before - self._passed:
            budget = self.budgets[tenant]
            limit = budget.soft if name == "soft" else budget.hard
            if self._on_passed is not None and limit is not None:
                self._on_passed(tenant, name, False, self.spent(tenant), limit)

    def add(self, month: str, tenant: str, cost: Decimal) -> None:
        """A request of the month was priced."""
        if month == self.month and tenant in self.budgets:
            self._spent[tenant] = self.spent(tenant) + cost
            self._look(tenant)

    def to_json(self) -> bytes:
        """As it is told to the workers."""
        spent = {tenant: f"{self.spent(tenant):.6f}" for tenant in sorted(self.budgets)}
        return json.dumps({"month": self.month, "spent": spent}).encode()

    def _look(self, tenant: str) -> None:
        budget, spent = self.budgets[tenant], self.spent(tenant)
        for name, limit in (("soft", budget.soft), ("hard", budget.hard)):
            if limit is not None and spent >= limit and (tenant, name) not in self._passed:
                self._passed.add((tenant, name))
                if self._on_passed is not None:
                    self._on_passed(tenant, name, True, spent, limit)


def _amount(where: str, value: Any) -> Decimal:
    amount = None
    if type(value) in (int, float, str):
        try:
            amount = Decimal(str(value))
        except InvalidOperation:
            amount = None
    if amount is None or not amount.is_finite() or amount <= 0:
        raise ConfigError(f"{where} must be an amount above 0, got {value!r}")
    return amount
