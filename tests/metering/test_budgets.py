"""Budgets: what is read, what is spent, who is told once."""

from __future__ import annotations

import calendar
import json
from decimal import Decimal

import pytest

from jaxserve.errors import ConfigError
from jaxserve.metering.budgets import Budget, Spending, end_of, month_of, read_budget


def test_a_budget_is_read():
    assert read_budget("x", None) is None
    assert read_budget("x", {"soft": 100, "hard": "120.50"}) == Budget(
        soft=Decimal(100), hard=Decimal("120.50")
    )
    assert read_budget("x", {"soft": 0.1}) == Budget(soft=Decimal("0.1"))


@pytest.mark.parametrize(
    "value",
    [7, {}, {"soft": -1}, {"soft": True}, {"hard": "much"}, {"hard": float("nan")},
     {"soft": 2, "hard": 1}, {"soft": 1, "firm": 2}, {"hard": 0}],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_refused(value):
    with pytest.raises(ConfigError, match="tenant 1"):
        read_budget("tenant 1", value)


def test_months_are_the_calendars_in_utc():
    before = calendar.timegm((2026, 12, 31, 23, 59, 59))
    assert (month_of(before), month_of(before + 1)) == ("2026-12", "2027-01")
    assert end_of("2026-12").timestamp() == before + 1
    assert end_of("2026-02").isoformat() == "2026-03-01T00:00:00+00:00"


def test_who_passes_a_limit_is_told_once_a_month():
    told = []
    budgets = {"acme": Budget(soft=Decimal(10), hard=Decimal(20)), "b": Budget(hard=Decimal(5))}
    spending = Spending(budgets, lambda *passed: told.append(passed))
    spending.begin("2026-11", {"acme": Decimal(9), "stranger": Decimal(99)})
    assert told == []
    spending.add("2026-11", "acme", Decimal("1.5"))
    spending.add("2026-11", "stranger", Decimal(1000))
    spending.add("2026-10", "acme", Decimal(1000))  # it ended before the month
    assert told == [("acme", "soft", True, Decimal("10.5"), Decimal(10))]
    spending.begin("2026-11", {"acme": Decimal("21")})  # as the ledger says
    assert told[1:] == [("acme", "hard", True, Decimal(21), Decimal(20))]
    assert json.loads(spending.to_json()) == {
        "month": "2026-11",
        "spent": {"acme": "21.000000", "b": "0.000000"},
    }
    spending.begin("2026-12", {})
    assert sorted(told[2:]) == [  # a new month: neither is passed any more
        ("acme", "hard", False, Decimal(0), Decimal(20)),
        ("acme", "soft", False, Decimal(0), Decimal(10)),
    ]
    spending.add("2026-12", "acme", Decimal(11))
    assert told[4:] == [("acme", "soft", True, Decimal(11), Decimal(10))]
