"""The observer's part that prices: requests into the ledger, budgets and the rate to the workers.

Each request that ends becomes an entry, each stretch of time its lines (`metering.hours`). `flush`
hands both to the ledger, in a thread; where that fails they stay here, and the workers keep their
reports.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxserve.config import MeteringConfig
from jaxserve.http.observer.part import Part
from jaxserve.metering.budgets import Budget, OnPassed, Spending, month_of
from jaxserve.metering.entry import ZERO, Entry, Line
from jaxserve.metering.live import LivePrices
from jaxserve.metering.meter import Meter
from jaxserve.metering.power.power import Power, make_power
from jaxserve.metering.prices import make_prices
from jaxserve.metering.pricing import entry_of
from jaxserve.protocol.records import RequestRecord
from jaxserve.protocol.status import StepStats

logger = logging.getLogger(__name__)

#: Topics that workers are told.
RATE, BUDGETS = "rate", "budgets"
#: How often the month's totals are taken from the ledger again.
TOTALS_S = 60.0
#: The same where it could not tell them.
AGAIN_S = 5.0
#: How long a tick waits for them; a database that is silent takes longer, and the workers are told
#: what was counted meanwhile.
PATIENCE_S = 1.0
#: Entries that wait for the ledger, at most; beyond it the oldest are lost, and counted.
MAX_UNKEPT = 500_000
#: Entries that it is given at a time, so that one that is away costs no more than these.
GIVEN_AT_ONCE = 2_000
#: Tenants whose budgets are in the metrics.
_MAX_TENANTS = 200


class Ledger(Protocol):
    """Where entries and lines are kept. Called in a thread, one call at a time."""

    def add(self, entries: Sequence[Entry], lines: Sequence[Line]) -> object:
        """Keeps them durably; those that it has are not counted again.

        Raises:
            Exception: it could not; they are given again.
        """
        ...

    def month_totals(self, month: str) -> Mapping[str, Decimal]:
        """What each tenant's requests of a month, "2026-11" for one, came to, in UTC."""
        ...


class Metering:
    """See the module; `part` is what the observer gets, `keeps` whether its file could be written.

    Args:
        tell: `Observer.tell`, from the first tick on.
        state: directory of what outlives the observer.
        budgets: by tenant.
        on_passed: told when a tenant passes a limit of its budget; it is logged where None.
        power: as configured where None.
        source: unique to a life of the server, of which an observer may have several.
        clock_ns, wall_s: CLOCK_MONOTONIC, and seconds since 1970.

    Raises:
        ConfigError: a price or a device cannot be used.
    """

    def __init__(
        self,
        config: MeteringConfig,
        ledger: Ledger,
        tell: Callable[[str, bytes], None],
        state: Path,
        *,
        budgets: Mapping[str, Budget] | None = None,
        on_passed: OnPassed | None = None,
        power: Power | None = None,
        source: str | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._prices = make_prices(config)
        self._ledger = ledger
        self._tell = tell
        self._clock_ns = clock_ns
        self._wall_s = wall_s
        self.meter = Meter(
            self._prices,
            power or make_power(config),
            source=source or life_of_the_server(),
            path=state / "meter.json",
            now_ns=clock_ns(),
        )
        self.spending = Spending(budgets or {}, on_passed or self._log_passed)
        self._live = LivePrices()
        self.keeps = True
        self._unkept: deque[Entry] = deque()
        self._num_kept = self._num_lost = 0
        self._charged = {"prefill": ZERO, "decode": ZERO, "waste": ZERO}
        self._charged_j = 0.0
        self._totals_due_ns = 0
        self._refreshing: asyncio.Task[None] | None = None
        self._asks_ledger = asyncio.Lock()
        self.part = Part(
            name="metering",
            ended=self.ended,
            step=self.step,
            tick=self.tick,
            flush=self.flush,
            metrics=self.metrics,
            close=self.close,
        )

    def ended(self, record: RequestRecord) -> None:
        """A request has ended: prices it, unless its answer has said what it cost."""
        now_ns = self._clock_ns()
        cost = record.cost or self.meter.rate.price(record)
        ended_s = self._wall_s() - (now_ns - (record.done_ns or now_ns)) / 1e9
        entry = entry_of(record, cost, ended_s)
        self._unkept.append(entry)
        if len(self._unkept) > MAX_UNKEPT:
            self._num_lost += 1
            self._unkept.popleft()
        if entry.tenant in self.spending.budgets:
            self.spending.add(month_of(ended_s), entry.tenant, entry.cost)
        self._live.add(entry, now_ns / 1e9)
        self._charged["prefill"] += entry.prefill_cost
        self._charged["decode"] += entry.decode_cost
        self._charged_j += entry.energy_j

    def step(self, stats: StepStats) -> None:
        """The device has worked."""
        self.meter.step(stats.at_ns, stats.device_ns)

    async def tick(self) -> None:
        """Settles the time that is over, and tells the workers what follows."""
        self._settle()
        self._tell(RATE, self.meter.rate.to_json())
        if self.spending.budgets:
            await self._refresh(month_of(self._wall_s()))
            if self.spending.month:  # before the first totals nobody is refused
                self._tell(BUDGETS, self.spending.to_json())

    async def flush(self) -> None:
        """Hands the ledger what it has not got; raises where it does not take it."""
        await self._flush(last=False)

    async def close(self) -> None:
        """The last lines."""
        await self._flush(last=True)

    def metrics(self) -> Iterator[Metric]:
        """The families of costs."""
        meter, currency = self.meter, self._prices.currency
        cost = CounterMetricFamily(
            "jaxserve_cost",
            "What requests are charged (prefill, decode); all that work cost (busy), of which the "
            "rest is waste; and what idle time cost",
            labels=["kind", "currency"],
        )
        for kind, amount in (
            ("prefill", self._charged["prefill"]),
            ("decode", self._charged["decode"]),
            ("busy", meter.busy_cost),
            ("idle", meter.idle_cost),
        ):
            cost.add_metric([kind, currency], float(amount))
        yield cost
        per_million = GaugeMetricFamily(
            "jaxserve_cost_per_million_tokens",
            "Over five minutes: input and output as charged, all with waste and idle time",
            labels=["kind", "currency"],
        )
        for kind, amount in self._live.per_million(self._clock_ns() / 1e9).items():
            per_million.add_metric([kind, currency], amount)
        yield per_million
        watts = GaugeMetricFamily("jaxserve_cost_power_watts", "Taken of late", labels=["source"])
        watts.add_metric([meter.power.source], meter.power.watts)
        yield watts
        yield CounterMetricFamily(
            "jaxserve_cost_power_modelled_seconds",
            "Time whose energy was modelled, since nothing measured it",
            meter.power.modelled_s,
        )
        yield CounterMetricFamily(
            "jaxserve_cost_energy_joules", "Charged to requests", self._charged_j
        )
        yield CounterMetricFamily(
            "jaxserve_cost_entries", "Requests kept in the ledger", self._num_kept
        )
        yield CounterMetricFamily(
            "jaxserve_cost_entries_lost",
            "Requests that the ledger did not take in time",
            self._num_lost,
        )
        yield GaugeMetricFamily(
            "jaxserve_cost_entries_waiting", "Requests that wait for the ledger", len(self._unkept)
        )
        yield from self._budget_metrics()

    def _budget_metrics(self) -> Iterator[Metric]:
        limits = GaugeMetricFamily(
            "jaxserve_cost_budget", "Of the month that runs", labels=["tenant", "kind"]
        )
        spent = GaugeMetricFamily(
            "jaxserve_cost_budget_spent", "In the month that runs", labels=["tenant"]
        )
        for tenant, budget in list(self.spending.budgets.items())[:_MAX_TENANTS]:
            spent.add_metric([tenant], float(self.spending.spent(tenant)))
            for kind, limit in (("soft", budget.soft), ("hard", budget.hard)):
                if limit is not None:
                    limits.add_metric([tenant, kind], float(limit))
        yield limits
        yield spent

    def _settle(self, *, last: bool = False) -> None:
        """Counts the time that is over."""
        now_ns = self._clock_ns()
        interval = self.meter.tick(now_ns, self._wall_s(), last=last)
        if interval is not None:
            wall_ns = interval.end_ns - interval.start_ns
            cost = self._prices.hardware(wall_ns) + self._prices.energy(interval.energy_j)
            self._live.spent(cost, now_ns / 1e9)

    def _log_passed(
        self, tenant: str, kind: str, passed: bool, spent: Decimal, limit: Decimal
    ) -> None:
        if not passed:
            return
        currency = self._prices.currency
        logger.warning(
            "tenant %s has spent %.2f %s this month, its %s budget is %s",
            *(tenant, spent, currency, kind, limit),
        )

    async def _flush(self, *, last: bool) -> None:
        async with self._asks_ledger:
            self._settle(last=last)  # what was reported so far: it is not reported again
            try:
                lines = self.meter.save(self._clock_ns(), last=last)
            except OSError:  # no lines, then; requests need no file here
                self.keeps = False
                await self._give([])
                raise
            self.keeps = True
            await self._give(lines)

    async def _give(self, lines: Sequence[Line]) -> None:
        """Gives the ledger lines, and what requests it has not got, some at a time."""
        left = len(self._unkept)
        while left or lines:
            entries = list(itertools.islice(self._unkept, min(left, GIVEN_AT_ONCE)))
            num_lost = self._num_lost
            await asyncio.to_thread(self._ledger.add, entries, lines)
            num_gone = self._num_lost - num_lost  # of them, for want of room meanwhile
            for _ in range(len(entries) - num_gone):
                self._unkept.popleft()
            self._num_kept += len(entries)
            self.meter.kept(lines)
            left, lines = left - len(entries), ()

    async def _refresh(self, month: str) -> None:
        """Has the month's totals taken from the ledger where that is due, and waits a moment."""
        task = self._refreshing
        if task is None:
            if month == self.spending.month and self._clock_ns() < self._totals_due_ns:
                return
            work = self._take_totals(month)
            task = self._refreshing = asyncio.create_task(work, name="jaxserve month's totals")
        await asyncio.wait([task], timeout=PATIENCE_S)
        if task.done():
            self._refreshing = None
            await task  # raises what it raised

    async def _take_totals(self, month: str) -> None:
        """Takes the month's totals from the ledger, and adds what it has not got."""
        async with self._asks_ledger:
            now_ns = self._clock_ns()
            try:
                totals = await asyncio.to_thread(self._ledger.month_totals, month)
                self._totals_due_ns = now_ns + int(TOTALS_S * 1e9)
            except Exception as error:  # whatever a store raises: what was counted so far stays
                logger.warning("the ledger does not tell the month's totals: %s", error)
                self._totals_due_ns = now_ns + int(AGAIN_S * 1e9)
                if month == self.spending.month:
                    return
                totals = {}
        self.spending.begin(month, totals)
        for entry in self._unkept:
            self.spending.add(month_of(entry.ended_s), entry.tenant, entry.cost)


def life_of_the_server() -> str:
    """Names this life of the server: its process, when that began, and the machine's boot."""
    parent = os.getppid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        boot, began = "", str(time.time_ns())
    return f"{boot}-{parent}-{began}"
