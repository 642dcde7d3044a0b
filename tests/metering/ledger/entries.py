"""Entries and lines for tests, and what they come to, counted by hand."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal

from jaxserve.metering.entry import ZERO, Entry, Line, LineKind

#: 2026-11-01T00:00Z.
NOVEMBER_S = 1_793_491_200
NOVEMBER_HOUR = NOVEMBER_S // 3600


def entry(number: int, *, tenant: str = "acme", ended_s: float = NOVEMBER_S, **values) -> Entry:
    """A request, told from others by its number."""
    fields = {
        "request_id": f"{number:032x}",
        "ended_s": ended_s,
        "route": "/v1/chat/completions",
        "outcome": "done",
        "model": "smollm2",
        "tenant": tenant,
        "key": f"{tenant}-key",
        "prompt_tokens": 10 + number,
        "cached_tokens": 4,
        "completion_tokens": 20,
        "prefill_device_ns": 1_000 + number,
        "decode_device_ns": 2_000,
        "wasted_device_ns": 30,
        "energy_j": 0.125,
        "carbon_g": 0.000_004,
        "prefill_cost": Decimal("0.000001234567") + number * Decimal("1e-12"),
        "decode_cost": Decimal("0.00000333"),
        "wasted_cost": Decimal("0.000000000001"),
    }
    return Entry(**(fields | values))


def month_of_entries(count: int, *, seed: int = 0, tenants: int = 5, users: int = 7) -> list[Entry]:
    """Requests all over November 2026, in no order."""
    source = random.Random(seed)
    return [
        entry(
            number,
            tenant=f"tenant{source.randrange(tenants)}",
            ended_s=NOVEMBER_S + source.random() * 30 * 86_400,
            user=f"user{source.randrange(users)}",
            model=source.choice(["small", "large"]),
            adapter=source.choice(["", "law"]),
            prompt_tokens=source.randrange(1000),
            decode_cost=Decimal(source.randrange(10**9)) * Decimal("1e-12"),
        )
        for number in range(count)
    ]


def line(number: int, **values) -> Line:
    """A line of an hour."""
    fields = {
        "source": "life",
        "number": number,
        "hour": NOVEMBER_HOUR,
        "kind": LineKind.BUSY,
        "duration_ns": 5,
        "cost": Decimal("0.25"),
    }
    return Line(**(fields | values))


def charged(entries: Iterable[Entry]) -> dict[str, Decimal]:
    """What each tenant owes: the sum of the amounts of the ledger, not of more exact ones."""
    totals: defaultdict[str, Decimal] = defaultdict(lambda: ZERO)
    for item in {item.request_id: item for item in entries}.values():
        totals[item.tenant] += item.prefill_cost + item.decode_cost
    return dict(totals)
