"""Takes in what all workers report, hands it to the parts, and answers what clients ask of them.

Invariants: each report reaches the parts once in this observer's life, in the order of its worker.
A worker is told that a report is kept after every part's `flush`. A part that raises harms no
other: it is counted and logged, and a part whose `flush` raises has the workers keep their reports.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from jaxserve.errors import JaxserveError, Overloaded
from jaxserve.http.errors import error_body
from jaxserve.http.metrics import END
from jaxserve.http.observer.messages import (
    TO_OBSERVER,
    TO_WORKER,
    Answer,
    Kept,
    News,
    Question,
    Report,
    Told,
)
from jaxserve.http.observer.part import Ask, Part
from jaxserve.protocol.frames import read_frame, write_frame

logger = logging.getLogger(__name__)

#: The questions that the observer answers itself: families of all parts as text, and as OpenMetrics
#: without the last line.
METRICS, OPEN_METRICS = "metrics", "openmetrics"
#: And this, to say that it lives.
ALIVE = "alive"
#: Between two faults of one part that are logged, or told as news.
_QUIET_S = 60.0
#: What has a question answered that not every observer answers.
_SETTINGS = {
    "usage": "metering.enabled",
    "costs": "metering.enabled",
    "baselines": "alerts.degradation",
}


class Observer:
    """Serves workers on a Unix socket, from `start` to `close`.

    Args:
        path: of the socket, in a directory of ours alone.
        flush_interval_s: between flushes, so what a crash may lose.
        outlives: whether what the parts keep outlives the server; told in the metrics.
    """

    def __init__(
        self, path: Path, parts: Sequence[Part], flush_interval_s: float, *, outlives: bool = True
    ) -> None:
        self._path = path
        self._parts = list(parts)
        self._flush_interval_s = flush_interval_s
        self._outlives = outlives
        self._asks: dict[str, tuple[Part, Ask]] = {}
        for part in parts:
            for name, ask in part.asks.items():
                assert name not in self._asks, f"two parts answer {name}"
                self._asks[name] = part, ask
        self._numbers: dict[str, int] = {}  # of the last report, by the worker's life
        self._unkept: dict[asyncio.StreamWriter, int] = {}  # the last report on each connection
        self._writers: set[asyncio.StreamWriter] = set()
        self._told: dict[str, Told] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self._num_faults: Counter[str] = Counter()
        self._logged_s: dict[str, float] = {}  # of each part, when a fault was logged last
        self._told_s: dict[str, float] = {}  # and told as news
        self._troubled: set[tuple[str, str]] = set()  # part and call whose trouble was told
        self._num_dropped: dict[str, int] = {}
        self._num_records = 0
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(self.metrics))

    async def start(self) -> None:
        """Begins to listen."""
        self._path.unlink(missing_ok=True)  # of an observer before
        self._server = await asyncio.start_unix_server(self._on_connection, self._path)
        for part in self._parts:
            if part.tick is not None:
                self._spawn(self._tick(part, part.tick), f"tick of {part.name}")
        self._spawn(self._keep(), "flush")

    async def close(self) -> None:
        """Keeps what has come, and ends."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._flush()
        for part in self._parts:
            if part.close is not None:
                await self._guarded(part, "close", part.close)
        for writer in self._writers:
            writer.close()

    def tell(self, topic: str, body: bytes) -> None:
        """Has all workers know something, also those that come later."""
        told = Told(topic=topic, body=body)
        if self._told.get(topic) == told:
            return
        self._told[topic] = told
        frame = TO_WORKER.encode(told)
        for writer in self._writers:
            write_frame(writer, frame)

    def metrics(self) -> Iterator[Metric]:
        """What the observer counts of itself, and the families of all parts."""
        yield CounterMetricFamily(
            "jaxserve_observer_requests", "Requests recorded", self._num_records
        )
        yield CounterMetricFamily(
            "jaxserve_observer_dropped",
            "Records dropped since the observer did not keep up",
            sum(self._num_dropped.values()),
        )
        faults = CounterMetricFamily(
            "jaxserve_observer_faults", "Faults of the observer's parts", labels=["part"]
        )
        for part in self._parts:
            faults.add_metric([part.name], self._num_faults[part.name])
        yield faults
        yield GaugeMetricFamily("jaxserve_observer_up", "1 if the observer answered", 1)
        yield GaugeMetricFamily(
            "jaxserve_observer_state_kept",
            "1 if what is recorded outlives the server, 0 if its directory could not be used",
            int(self._outlives),
        )
        for part in self._parts:
            if part.metrics is not None:
                yield from self._call(part, lambda make=part.metrics: list(make())) or []

    # ------------------------------------------------------------------ workers

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        for told in self._told.values():
            write_frame(writer, TO_WORKER.encode(told))
        try:
            while True:
                match TO_OBSERVER.decode(await read_frame(reader)):
                    case Report() as report:
                        self._take(report)
                        self._unkept[writer] = report.number
                    case Question() as question:
                        self._spawn(self._answer(question, writer), question.name)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the worker has ended, or comes again
        except asyncio.CancelledError:
            pass  # `close`; asyncio would log the end of a connection's task as a fault
        except ValueError as error:
            logger.warning("a worker said what the observer does not understand: %s", error)
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            self._unkept.pop(writer, None)
            writer.close()

    def _take(self, report: Report) -> None:
        """Hands a report to the parts, unless they have had it."""
        if report.number <= self._numbers.get(report.life, 0):
            return
        self._numbers[report.life] = report.number
        self._num_dropped[report.life] = report.dropped
        self._num_records += len(report.ended)
        for part in self._parts:
            self._each(part, part.news, report.news)
            self._each(part, part.begun, report.begun)
            self._each(part, part.first_token, report.first_tokens)
            self._each(part, part.step, report.steps)
            self._each(part, part.ended, report.ended)
            if report.status is not None:
                self._each(part, part.status, [report.status])

    def news(self, kind: str, subject: str = "") -> None:
        """Something happened here."""
        news = News(kind=kind, at_ns=time.monotonic_ns(), subject=subject)
        for part in self._parts:
            self._each(part, part.news, [news])

    async def _answer(self, question: Question, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._ask(question)
        except JaxserveError as error:
            answer = Answer(status=error.status, body=msgspec.json.encode(error_body(error)))
        except Exception as error:
            self._fault(self._asks[question.name][0], error)
            answer = Answer(
                status=500, body=msgspec.json.encode(error_body(JaxserveError("internal error")))
            )
        answer.id = question.id
        write_frame(writer, TO_WORKER.encode(answer))

    async def _ask(self, question: Question) -> Answer:
        if question.name == ALIVE:
            return Answer()
        if question.name == METRICS:
            return Answer(content_type="text/plain", body=generate_latest(self._registry))
        if question.name == OPEN_METRICS:
            text = openmetrics.generate_latest(self._registry)
            return Answer(content_type="text/plain", body=text.removesuffix(END))
        if question.name in self._asks:
            return await self._asks[question.name][1](question)
        setting = _SETTINGS.get(question.name)
        if setting is None:
            raise JaxserveError(f"no part of the observer answers {question.name}")
        raise Overloaded(f"{question.name} is not kept here: start the server with {setting}=true")

    # ------------------------------------------------------------------ time

    async def _tick(self, part: Part, tick: Callable[[], Awaitable[None]]) -> None:
        """A part's own: one that waits (a disk, a database) delays no other."""
        while True:
            await self._guarded(part, "tick", tick)
            await asyncio.sleep(1.0)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._flush_interval_s)
            await self._flush()

    async def _flush(self) -> None:
        """Has all parts keep what they took, and says so to the workers."""
        unkept, self._unkept = self._unkept, {}
        flushes = [
            self._guarded(part, "flush", part.flush)
            for part in self._parts
            if part.flush is not None
        ]
        if not all(await asyncio.gather(*flushes)):  # together: a slow one delays no other
            self._unkept = unkept | self._unkept
            return
        for writer, number in unkept.items():
            if writer in self._writers:
                write_frame(writer, TO_WORKER.encode(Kept(number=number)))

    # ------------------------------------------------------------------ faults

    def _each(self, part: Part, call: Callable[[Any], None] | None, items: Sequence[Any]) -> None:
        if call is not None:
            for item in items:
                self._call(part, lambda item=item: call(item))

    def _call[T](self, part: Part, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception as error:
            self._fault(part, error)
            return None

    async def _guarded(self, part: Part, name: str, call: Any) -> bool:
        """Awaits a call of a part; whether it went well."""
        try:
            await call()
        except (OSError, JaxserveError) as error:
            # A disk, a database: what is wrong is in the message, and is so until it is mended.
            if (part.name, name) not in self._troubled:
                self._troubled.add((part.name, name))
                known = isinstance(error, JaxserveError)
                message = error.message if known else error.strerror or error
                logger.error("the observer's %s cannot do its work: %s", part.name, message)
            self._count_fault(part)
            return False
        except Exception as error:
            self._fault(part, error)
            return False
        if (part.name, name) in self._troubled:
            self._troubled.discard((part.name, name))
            logger.warning("the observer's %s does its work again", part.name)
        return True

    def _fault(self, part: Part, error: Exception) -> None:
        """What a part should not have done; logged now and then."""
        now_s = time.monotonic()
        if now_s - self._logged_s.get(part.name, -_QUIET_S) >= _QUIET_S:
            self._logged_s[part.name] = now_s
            logger.error("the observer's %s failed", part.name, exc_info=error)
        self._count_fault(part)

    def _count_fault(self, part: Part) -> None:
        """Counts it, and tells it as news now and then."""
        self._num_faults[part.name] += 1
        now_s = time.monotonic()
        if now_s - self._told_s.get(part.name, -_QUIET_S) >= _QUIET_S:
            self._told_s[part.name] = now_s
            self.news("part_failed", part.name)

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=f"jaxserve observer {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Collector(Collector):
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def describe(self) -> list[Metric]:
        """Nothing: what there is depends on what has come."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See `Observer.metrics`."""
        return self._collect()
