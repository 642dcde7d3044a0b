"""PostgreSQL goes away, and the observer dies meanwhile: workers keep reports until it is back.

The part here does what the metering part does: entries wait in it until the ledger has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from jaxserve.http.observer import reporter as reporter_module
from jaxserve.http.observer.observer import Observer
from jaxserve.http.observer.part import Part
from jaxserve.http.observer.reporter import ObserverLink
from jaxserve.metering.entry import Entry
from jaxserve.metering.ledger.book import Ledger
from jaxserve.metering.ledger.postgres import Postgres
from jaxserve.protocol.records import RequestRecord
from tests.metering.ledger.entries import NOVEMBER_S
from tests.metering.ledger.postgres_server import PostgresServer


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """A server that the test may end."""
    monkeypatch.setattr(reporter_module, "RETRY_S", 0.01)
    server = PostgresServer()
    server.start()
    yield server
    server.remove()


class Writer:
    """Writes each request into a ledger."""

    def __init__(self, url: str) -> None:
        self.ledger = Ledger(Postgres(url))
        self.num_failures = 0
        self._unkept: list[Entry] = []
        self.part = Part(name="writer", ended=self.ended, flush=self.flush, close=self.close)

    def ended(self, record: RequestRecord) -> None:
        entry = Entry(
            request_id=record.request_id,
            ended_s=NOVEMBER_S,
            route=record.route,
            outcome=record.outcome,
            tenant="acme",
            decode_cost=Decimal("0.001"),
        )
        self._unkept.append(entry)

    async def flush(self) -> None:
        entries = list(self._unkept)
        try:
            await asyncio.to_thread(self.ledger.add, entries)
        except Exception:
            self.num_failures += 1
            raise
        del self._unkept[: len(entries)]

    async def close(self) -> None:
        self.ledger.close()


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until something is so."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_nothing_is_lost_and_nothing_counted_twice(tmp_path: Path, postgres: PostgresServer):
    def report(link: ObserverLink, numbers: range) -> None:
        for number in numbers:
            record = RequestRecord(request_id=f"{number:032x}", route="/x", arrived_ns=1)
            link.ended(record)

    async def observe(writer: Writer, work: Callable[[], None], done: Callable[[], bool]) -> None:
        observer = Observer(tmp_path / "o", [writer.part], flush_interval_s=0.02)
        await observer.start()
        await until(lambda: link._writer is not None)
        work()
        await until(done)
        await observer.close()

    async def story() -> None:
        nonlocal link
        link = ObserverLink(tmp_path / "o", 0, interval_s=0.005, max_records=10_000)
        link.start()
        first = Writer(postgres.url)
        await observe(first, lambda: report(link, range(50)), lambda: first.ledger.num_added == 50)
        postgres.stop()
        second = Writer(postgres.url)  # sees requests that it never can write, and dies
        await observe(second, lambda: report(link, range(50, 80)), lambda: second.num_failures >= 2)
        third = Writer(postgres.url)

        def back() -> None:
            report(link, range(80, 100))
            postgres.start()

        await observe(third, back, lambda: third.ledger.num_added == 50)
        assert not link.num_dropped
        await link.close()

    link: ObserverLink
    asyncio.run(story())
    ledger = Ledger(Postgres(postgres.url))
    assert ledger.month_totals("2026-11") == {"acme": Decimal("0.1")}
    ledger.close()
