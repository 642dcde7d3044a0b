"""A worker's end of the road to the observer: reports what it sees, asks for what clients want.

Requests, steps and news are collected and sent together, some times a second. What was sent is
kept until the observer says that it is kept there, and sent again to one that was started anew. An
observer that is slow or gone makes nobody wait: beyond a bound the oldest are dropped, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from jaxserve.errors import Overloaded
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
from jaxserve.protocol.frames import read_frame, write_frame
from jaxserve.protocol.records import Begun, FirstToken, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats

logger = logging.getLogger(__name__)

#: Between attempts to reach the observer.
RETRY_S = 0.5
#: How long a question may take.
ANSWER_S = 30.0
#: At the worker's end, how long its last reports may take to be kept.
FAREWELL_S = 3.0
#: Written and not taken in by the observer: it is sent no more until it has been.
HIGH_WATER_BYTES = 4 * 1024 * 1024


class Reporter(Protocol):
    """Where a worker's records go."""

    def begun(self, begun: Begun) -> None:
        """A request has arrived."""
        ...

    def first_token(self, record: RequestRecord) -> None:
        """A request has its first token."""
        ...

    def ended(self, record: RequestRecord) -> None:
        """A request has ended."""
        ...

    def step(self, stats: StepStats) -> None:
        """The engine has made a device call."""
        ...

    def news(self, kind: str, subject: str = "") -> None:
        """See `messages.News`."""
        ...

    def told(self, topic: str) -> bytes | None:
        """What the observer said last about a topic; None before it has."""
        ...

    async def ask(self, question: Question) -> Answer:
        """Asks the observer.

        Raises:
            Overloaded: there is none, or it does not answer.
        """
        ...


class NoReporter:
    """Nobody observes: tests, or `telemetry.enabled=false`."""

    def begun(self, begun: Begun) -> None:
        """See `Reporter`."""

    def first_token(self, record: RequestRecord) -> None:
        """See `Reporter`."""

    def ended(self, record: RequestRecord) -> None:
        """See `Reporter`."""

    def step(self, stats: StepStats) -> None:
        """See `Reporter`."""

    def news(self, kind: str, subject: str = "") -> None:
        """See `Reporter`."""

    def told(self, topic: str) -> bytes | None:
        """See `Reporter`."""
        return None

    async def ask(self, question: Question) -> Answer:
        """See `Reporter`."""
        raise Overloaded("nothing is observed here: start the server with telemetry.enabled=true")


class ObserverLink:
    """A `Reporter` over the observer's socket, from `start` to `close`.

    Args:
        path: of the socket; it need not be there yet.
        worker: index among the workers.
        interval_s: between reports.
        max_records: that wait to be kept; beyond it the oldest are dropped.
        status: the engine's last word, reported by the one worker that is given this.

    Attributes:
        num_dropped: records dropped so far.
    """

    def __init__(
        self,
        path: Path,
        worker: int,
        *,
        interval_s: float,
        max_records: int,
        status: Callable[[], EngineStatus | None] | None = None,
    ) -> None:
        self.num_dropped = 0
        self._path = path
        self._worker = worker
        self._interval_s = interval_s
        self._max_records = max_records
        self._status = status
        self._status_ns = 0
        self._next = Report(worker=worker, life=secrets.token_hex(8), number=1)
        self._unkept: deque[tuple[int, int, bytes]] = deque()  # number, records, frame
        self._num_unkept = 0
        self._writer: asyncio.StreamWriter | None = None
        self._told: dict[str, bytes] = {}
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._num_asked = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._all_kept = asyncio.Event()
        self._all_kept.set()

    def start(self) -> None:
        """Begins to report, on the running event loop."""
        self._tasks = [
            asyncio.create_task(self._stay_connected(), name="jaxserve observer link"),
            asyncio.create_task(self._report(), name="jaxserve reports"),
        ]

    async def close(self) -> None:
        """Sends what is left, and waits a moment for it to be kept."""
        self._send_report()
        if self._writer is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._all_kept.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begun(self, begun: Begun) -> None:
        """See `Reporter`."""
        self._next.begun.append(begun)

    def first_token(self, record: RequestRecord) -> None:
        """See `Reporter`."""
        self._next.first_tokens.append(
            FirstToken(request_id=record.request_id, at_ns=record.first_token_ns)
        )

    def ended(self, record: RequestRecord) -> None:
        """See `Reporter`."""
        self._next.ended.append(record)

    def step(self, stats: StepStats) -> None:
        """See `Reporter`."""
        self._next.steps.append(stats)

    def news(self, kind: str, subject: str = "") -> None:
        """See `Reporter`."""
        self._next.news.append(News(kind=kind, at_ns=time.monotonic_ns(), subject=subject))

    def told(self, topic: str) -> bytes | None:
        """See `Reporter`."""
        return self._told.get(topic)

    async def ask(self, question: Question) -> Answer:
        """See `Reporter`."""
        writer = self._writer
        if writer is None:
            raise _not_there()
        self._num_asked += 1
        question.id = self._num_asked
        self._send_report()  # so that the answer knows what has ended before the question
        future = self._asked[question.id] = asyncio.get_running_loop().create_future()
        write_frame(writer, TO_OBSERVER.encode(question))
        try:
            async with asyncio.timeout(ANSWER_S):
                return await future
        except TimeoutError:
            raise Overloaded(
                f"the observer did not answer within {ANSWER_S:g} s; try again shortly"
            ) from None
        finally:
            del self._asked[question.id]

    # ------------------------------------------------------------------ reports

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self._send_report()

    def _send_report(self) -> None:
        """Sends what has come since the report before, if anything has."""
        report = self._next
        now_ns = time.monotonic_ns()
        if self._status is not None and now_ns - self._status_ns > 1e9:
            self._status_ns = now_ns
            report.status = self._status()
        records = (report.begun, report.first_tokens, report.ended, report.steps)
        if not (any(records) or report.news or report.status):
            return
        report.dropped = self.num_dropped
        self._next = Report(worker=self._worker, life=report.life, number=report.number + 1)
        num_records = sum(map(len, records))
        try:
            frame = TO_OBSERVER.encode(report)
        except Exception:  # a value that no frame holds: what comes after it is reported
            logger.exception("%d records cannot be told to the observer", num_records)
            self.num_dropped += num_records
            return
        self._unkept.append((report.number, num_records, frame))
        self._num_unkept += num_records
        self._all_kept.clear()
        while self._num_unkept > self._max_records and len(self._unkept) > 1:
            _, num_records, _ = self._unkept.popleft()
            self._num_unkept -= num_records
            self.num_dropped += num_records
        self._write(frame)

    def _write(self, frame: bytes) -> None:
        writer = self._writer
        if writer is None:
            return
        if writer.transport.get_write_buffer_size() > HIGH_WATER_BYTES:
            # It does not read: what it misses is sent again, in order, on another connection.
            writer.transport.abort()
            self._writer = None
            return
        write_frame(writer, frame)

    # ------------------------------------------------------------------ the connection

    async def _stay_connected(self) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
            except OSError:
                await asyncio.sleep(RETRY_S)
                continue
            for _, _, frame in self._unkept:
                write_frame(writer, frame)
            self._writer = writer
            try:
                while True:
                    self._receive(await read_frame(reader))
            except (OSError, asyncio.IncompleteReadError):
                pass  # it has ended; another is started
            except ValueError as error:
                logger.warning("the observer said what this worker does not understand: %s", error)
            finally:
                self._writer = None
                writer.close()
                for future in self._asked.values():
                    if not future.done():
                        future.set_exception(_not_there())
            await asyncio.sleep(RETRY_S)

    def _receive(self, frame: bytes) -> None:
        match TO_WORKER.decode(frame):
            case Kept(number=number):
                while self._unkept and self._unkept[0][0] <= number:
                    self._num_unkept -= self._unkept.popleft()[1]
                if not self._unkept:
                    self._all_kept.set()
            case Answer() as answer:
                future = self._asked.get(answer.id)
                if future is not None and not future.done():
                    future.set_result(answer)
            case Told(topic=topic, body=body):
                self._told[topic] = body


def _not_there() -> Overloaded:
    return Overloaded("the observer is not there at the moment; try again shortly")
