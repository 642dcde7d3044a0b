"""The ledger's speed: how long do reports take over a million requests, and what does adding cost?

Question: is a month's report per tenant, over 1,000,000 requests, there within a second, and what
does a flush of some hundred requests take of the observer's time? Method: a month of requests of
some tenants, keys, models and many users, added in flushes as an observer does, in the order of
their time. Then each report is asked for several times, beside a scan of every row as the same
question without sums by day would need. PostgreSQL likewise, where an address is given.

Command: `PYTHONPATH=. .venv/bin/python benchmarks/ledger.py [--postgres postgresql://…]`
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from jaxserve.bench import stats
from jaxserve.metering.entry import Entry, Line, LineKind
from jaxserve.metering.ledger.book import Ledger, database_at
from jaxserve.metering.ledger.query import Interval, Query, month_hours, month_number
from jaxserve.metering.reports import costs_report

MONTH = "2026-11"
START, END = month_hours(month_number(MONTH))
LIMIT_S = 1.0


def requests(count: int, tenants: int, users: int) -> Iterator[Entry]:
    """A month of them, in the order of their time."""
    source = random.Random(0)
    step_s = (END - START) * 3600 / count
    for number in range(count):
        tenant = source.randrange(tenants)
        yield Entry(
            request_id=f"{source.getrandbits(128):032x}",
            ended_s=START * 3600 + number * step_s,
            route="/v1/chat/completions",
            outcome="done",
            model="smollm2-135m-instruct",
            adapter=source.choice(["", "", "law"]),
            tenant=f"tenant-{tenant}",
            key=f"tenant-{tenant}-{source.randrange(3)}",
            user=f"user-{source.randrange(users)}",
            prompt_tokens=source.randrange(4000),
            completion_tokens=source.randrange(1000),
            prefill_device_ns=source.randrange(10**7),
            decode_device_ns=source.randrange(10**8),
            energy_j=source.random(),
            prefill_cost=Decimal(source.randrange(10**8)) * Decimal("1e-12"),
            decode_cost=Decimal(source.randrange(10**9)) * Decimal("1e-12"),
        )


def fill(ledger: Ledger, entries: Iterator[Entry], flush: int) -> list[float]:
    """Adds them; returns how long each flush took, in seconds."""
    seconds = []
    batch: list[Entry] = []
    number = 0

    def add() -> None:
        nonlocal number
        number += 4
        lines = [
            Line(source="life", number=number - 3 + place, hour=START, kind=kind, duration_ns=1)
            for place, kind in enumerate(LineKind)
        ]
        started = time.perf_counter()
        ledger.add(batch, lines)
        seconds.append(time.perf_counter() - started)
        batch.clear()

    for entry in entries:
        batch.append(entry)
        if len(batch) == flush:
            add()
    if batch:
        add()
    return seconds


def reports(ledger: Ledger) -> dict[str, Callable[[], object]]:
    """What is asked."""

    def asked(**values: Any) -> Callable[[], object]:
        query = Query(start_hour=START, end_hour=END, **values)
        return lambda: ledger.usage(query)

    by_url = {"from": "2026-11-01", "to": "2026-12-01", "group_by": "tenant", "interval": "month"}
    return {
        "month totals of all tenants": lambda: ledger.month_totals(MONTH),
        "/v1/costs by tenant, month": lambda: costs_report(
            ledger, "usd", by_url, "", True, END * 3600.0
        ),
        "by tenant and day": asked(group_by=("tenant",)),
        "by tenant, key, model, adapter and day": asked(
            group_by=("tenant", "key_name", "model", "adapter")
        ),
        "one tenant by hour": asked(interval=Interval.HOUR, only={"tenant": "tenant-0"}),
        "one tenant's users": asked(
            interval=Interval.MONTH, group_by=("user_name",), only={"tenant": "tenant-0"}
        ),
    }


def scan(ledger: Ledger) -> object:
    """The month by tenant without any sums."""
    with ledger._database.reading() as session:
        return session.execute(
            "SELECT tenant, SUM(prefill_cost + decode_cost) FROM requests"
            " WHERE hour >= ? AND hour < ? GROUP BY tenant",
            [START, END],
        )


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(ledger: Ledger, arguments: argparse.Namespace) -> dict[str, object]:
    """Fills a ledger and asks it."""
    flushes = fill(
        ledger, requests(arguments.rows, arguments.tenants, arguments.users), arguments.flush
    )
    rows = [(name, timed(work, arguments.repeats)) for name, work in reports(ledger).items()]
    rows.append(("by tenant, from each row", timed(lambda: scan(ledger), 3)))
    print(
        f"{ledger.name}: {arguments.rows:,} requests, {arguments.flush} a flush: "
        f"{stats.median(flushes) * 1e3:.1f} ms a flush (p99 "
        f"{stats.percentile(flushes, 99) * 1e3:.1f}), "
        f"{arguments.rows / sum(flushes):,.0f} requests/s",
        file=sys.stderr,
    )
    table = [
        [name, f"{stats.median(seconds) * 1e3:.1f}", f"{max(seconds) * 1e3:.1f}"]
        for name, seconds in rows
    ]
    print(stats.table(["report", "median ms", "max ms"], table), file=sys.stderr)
    return {
        "flush_ms_p50": stats.median(flushes) * 1e3,
        "flush_ms_p99": stats.percentile(flushes, 99) * 1e3,
        "requests_per_s": arguments.rows / sum(flushes),
        "report_ms": {name: max(seconds) * 1e3 for name, seconds in rows},
        "within_limit": max(rows[0][1] + rows[1][1]) < LIMIT_S,
    }


def main() -> int:
    """Prints a table for each database, and one line of JSON; 1 where the limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--flush", type=int, default=500, help="requests of one add")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--postgres", default="", help="address of an empty database, too")
    arguments = parser.parse_args()
    record: dict[str, object] = {
        "benchmark": "ledger",
        **stats.environment(),
        "rows": arguments.rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(database_at("", Path(folder)))
        record["sqlite"] = measure(ledger, arguments)
        ledger.close()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        record["bytes_per_request"] = size / arguments.rows
        print(f"{size / arguments.rows:.0f} bytes a request\n", file=sys.stderr)
    if arguments.postgres:
        ledger = Ledger(database_at(arguments.postgres, Path()))
        record["postgres"] = measure(ledger, arguments)
        ledger.close()
    print(stats.json_line(record))
    measured = [record[name] for name in ("sqlite", "postgres") if name in record]
    return 0 if all(of["within_limit"] for of in measured) else 1  # pyright: ignore


if __name__ == "__main__":
    sys.exit(main())
