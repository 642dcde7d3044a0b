"""The ledger in the observer: answers /v1/usage and /v1/costs, and forgets what is old.

What is written into it comes from the metering part, which has the same `Ledger`. Everything that
touches the database runs in threads: a slow one delays its own answers only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxserve.config import MeteringConfig
from jaxserve.errors import LedgerUnavailable, Overloaded
from jaxserve.http.observer.messages import Answer, Question
from jaxserve.http.observer.part import Part
from jaxserve.metering.ledger.book import Ledger, database_at
from jaxserve.metering.ledger.rows import HOUR_S
from jaxserve.metering.reports import costs_report, usage_report

logger = logging.getLogger(__name__)

#: Reports at a time, and how many more may wait: a crowd of clients cannot take the database.
_REPORTS, _MAX_WAITING = 2, 32
#: Between looks at what is too old.
_FORGET_EVERY_S = 3600.0


def open_ledger(config: MeteringConfig, state: Path, currency: str = "usd") -> Ledger:
    """The ledger of the configuration; nothing is opened before it is used.

    Args:
        state: directory of what outlives the observer.

    Raises:
        ConfigError: it can never be used.
    """
    return Ledger(database_at(config.ledger, state), currency)


def check_ledger(config: MeteringConfig) -> None:
    """Looks at the address of the ledger.

    Raises:
        ConfigError: it can never be used.
    """
    database_at(config.ledger, Path()).close()


class LedgerPart:
    """See the module.

    Args:
        keep_days: see `MeteringConfig`; 0 forgets nothing.
        is_fed: whether what is to be written down gets as far as the ledger.
        clock_s: wall clock. elapsed_s: a clock that never steps.

    Attributes:
        part: for the observer.
    """

    def __init__(
        self,
        ledger: Ledger,
        currency: str = "usd",
        keep_days: int = 0,
        is_fed: Callable[[], bool] = lambda: True,
        clock_s: Callable[[], float] = time.time,
        elapsed_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._currency = currency.lower()  # as OpenAI has it
        self._keep_days = keep_days
        self._is_fed = is_fed
        self._clock_s = clock_s
        self._elapsed_s = elapsed_s
        self._forget_at_s = elapsed_s() + _FORGET_EVERY_S
        self._forgetting: asyncio.Task[None] | None = None
        self._reports = asyncio.Semaphore(_REPORTS)
        self._num_reports = self._num_waiting = 0
        self.part = Part(
            name="ledger",
            tick=self.tick,
            asks={"usage": self.usage, "costs": self.costs},
            metrics=self.metrics,
            close=self.close,
        )

    async def usage(self, question: Question) -> Answer:
        """/v1/usage."""
        return await self._report(question, partial(usage_report, self._ledger))

    async def costs(self, question: Question) -> Answer:
        """/v1/costs."""
        return await self._report(question, partial(costs_report, self._ledger, self._currency))

    async def tick(self) -> None:
        """Once an hour, forgets the oldest day that is too old."""
        if not self._keep_days or self._elapsed_s() < self._forget_at_s:
            return
        if self._forgetting is None or self._forgetting.done():
            self._forget_at_s = self._elapsed_s() + _FORGET_EVERY_S
            self._forgetting = asyncio.create_task(self._forget(), name="jaxserve ledger forgets")

    def metrics(self) -> Iterator[Metric]:
        """How the ledger is."""
        yield GaugeMetricFamily(
            "jaxserve_ledger_up",
            "1 if it could be written the last time, and what leads to it",
            int(self._ledger.up and self._is_fed()),
        )
        yield CounterMetricFamily(
            "jaxserve_ledger_rows", "Requests and lines written down", self._ledger.num_added
        )
        yield CounterMetricFamily(
            "jaxserve_ledger_failures", "Times it could not be written", self._ledger.num_failures
        )
        yield CounterMetricFamily(
            "jaxserve_ledger_reports", "Answers to /v1/usage and /v1/costs", self._num_reports
        )

    async def close(self) -> None:
        """Lets go of the database, after the last `add`."""
        if self._forgetting is not None:
            await asyncio.gather(self._forgetting, return_exceptions=True)
        await asyncio.to_thread(self._ledger.close)

    async def _report(self, question: Question, report: Callable[..., tuple[str, bytes]]) -> Answer:
        if self._num_waiting >= _MAX_WAITING:
            raise Overloaded(f"{_MAX_WAITING} reports of usage wait already; try again shortly")
        self._num_waiting += 1
        try:
            await self._reports.acquire()
        finally:
            self._num_waiting -= 1
        try:
            kind, body = await asyncio.to_thread(
                report, question.query, question.tenant, question.admin, self._clock_s()
            )
        finally:
            self._reports.release()
        self._num_reports += 1
        return Answer(content_type=kind, body=body)

    async def _forget(self) -> None:
        before_hour = int(self._clock_s()) // HOUR_S - self._keep_days * 24
        try:
            num_deleted = await asyncio.to_thread(self._ledger.forget, before_hour)
        except LedgerUnavailable as error:
            logger.warning("%s; what is too old is kept for another hour", error.message)
            return
        if num_deleted:
            logger.info("the ledger has forgotten %d rows of an old day", num_deleted)
