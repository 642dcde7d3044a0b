"""A ledger that does not answer: nobody waits for it but who asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import pytest

from jaxserve.http.observer import metering as metering_module
from jaxserve.http.observer.metering import TOTALS_S
from jaxserve.metering.budgets import Budget
from jaxserve.protocol.messages import SequenceRecord
from tests.http.observer.test_metering import Book, S, Watched, spent


class SilentBook(Book):
    """Tells a month's totals once it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()

    def month_totals(self, month: str) -> Mapping[str, Decimal]:
        self.answers.wait()
        return super().month_totals(month)


def test_budgets_are_told_while_the_ledger_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metering_module, "PATIENCE_S", 0.01)
    book = SilentBook()
    watched = Watched(tmp_path, book=book, budgets={"acme": Budget(hard=Decimal(1))})

    def ended() -> None:
        watched.ended(SequenceRecord(decode_device_ns=36 * S), tenant="acme")  # about 0.1

    async def refreshed() -> None:
        task = watched.metering._refreshing
        assert task is not None
        await task
        await watched.metering.tick()

    async def story() -> None:
        await watched.metering.tick()
        assert "rate" in watched.told and "budgets" not in watched.told
        book.answers.set()
        book.totals = {"acme": Decimal("0.5")}
        await refreshed()
        assert spent(watched) == {"acme": "0.500000"}
        book.answers.clear()
        watched.clock.ns += int(TOTALS_S * S)
        ended()
        await watched.metering.tick()
        first = Decimal(spent(watched)["acme"])
        assert 0.59 < first < 0.62
        ended()
        await watched.metering.tick()
        assert Decimal(spent(watched)["acme"]) > first + Decimal("0.09")
        book.totals = {"acme": Decimal(2)}  # without these two, which it has not got
        book.answers.set()
        await refreshed()
        assert 2.19 < Decimal(spent(watched)["acme"]) < 2.22

    async def in_time() -> None:
        try:
            async with asyncio.timeout(20):
                await story()
        finally:
            book.answers.set()  # its thread ends

    asyncio.run(in_time())
