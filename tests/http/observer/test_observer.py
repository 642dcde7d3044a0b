"""Workers and the observer over its socket: each report reaches every part, once, and is kept."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jaxserve.errors import Overloaded
from jaxserve.http.observer import reporter as reporter_module
from jaxserve.http.observer.messages import Answer, News, Question, Report
from jaxserve.http.observer.observer import METRICS, Observer
from jaxserve.http.observer.part import Part
from jaxserve.http.observer.reporter import NoReporter, ObserverLink
from jaxserve.protocol.messages import Interval, SequenceRecord
from jaxserve.protocol.records import Asked, Begun, FirstToken, Outcome, RequestRecord


class Book:
    """A part that remembers what it got."""

    def __init__(self, name: str = "book", fails: bool = False) -> None:
        self.records: list[RequestRecord] = []
        self.begun: list[Begun] = []
        self.first_tokens: list[FirstToken] = []
        self.news: list[News] = []
        self.num_flushes = 0
        self.fails = fails
        self.keeps = not fails
        self.part = Part(
            name=name,
            ended=self.on_ended,
            begun=self.begun.append,
            first_token=self.first_tokens.append,
            news=self.news.append,
            flush=self.flush,
            asks={name: self.ask},
        )

    def on_ended(self, record: RequestRecord) -> None:
        if self.fails:
            raise RuntimeError("a fault of this part")
        self.records.append(record)

    async def flush(self) -> None:
        if not self.keeps:
            raise OSError("the disk is full")
        self.num_flushes += 1

    async def ask(self, question: Question) -> Answer:
        return Answer(body=f"{len(self.records)} {question.tenant} {question.query}".encode())


def record(number: int, **values) -> RequestRecord:
    """A request that has ended."""
    return RequestRecord(
        request_id=f"{number:032x}", route="/v1/completions", arrived_ns=1, **values
    )


@asynccontextmanager
async def observing(path: Path, *books: Book):
    """An observer, as long as it is needed."""
    observer = Observer(path, [book.part for book in books], flush_interval_s=0.01)
    await observer.start()
    try:
        yield observer
    finally:
        await observer.close()


@asynccontextmanager
async def linked(path: Path, max_records: int = 1000):
    """A worker's end."""
    link = ObserverLink(path, 0, interval_s=0.005, max_records=max_records)
    link.start()
    try:
        yield link
    finally:
        await link.close()


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until something is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def run(work: Awaitable[None]) -> None:
    """Runs a test's coroutine."""

    async def whole() -> None:
        await work

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "RETRY_S", 0.01)


def test_a_record_arrives_whole(tmp_path: Path):
    whole = record(
        1,
        tenant="acme",
        outcome=Outcome.EXPIRED,
        asked=Asked(temperature=0.5, stop=["a", "b"]),
        finish_reasons=["stop"],
        sequences=[
            SequenceRecord(output_tokens=3, intervals=[Interval(kind="x", start_ns=1, end_ns=2)])
        ],
    )

    async def work() -> None:
        book = Book()
        async with observing(tmp_path / "o", book), linked(tmp_path / "o") as link:
            link.begun(Begun(request_id="1", arrived_ns=5, route="/v1/completions", priority=-3))
            link.first_token(record(1, first_token_ns=7))
            link.ended(whole)
            link.news("engine_down", "it died")
            await until(lambda: bool(book.records and book.news))
            assert book.records == [whole]
            assert book.begun[0].priority == -3
            assert book.first_tokens == [FirstToken(request_id=f"{1:032x}", at_ns=7)]
            assert (book.news[0].kind, book.news[0].subject) == ("engine_down", "it died")

    run(work())


def test_a_record_that_cannot_be_told_is_counted_and_stops_no_other(tmp_path: Path):
    async def work() -> None:
        book = Book()
        async with observing(tmp_path / "o", book), linked(tmp_path / "o") as link:
            for value in (2**70, -(2**70)):
                link.begun(Begun(request_id="1", arrived_ns=5, route="/", priority=value))
                await until(lambda: not link._next.begun)
            link.begun(Begun(request_id="2", arrived_ns=5, route="/", tenant="\ud800"))
            await until(lambda: link.num_dropped == 3)
            link.ended(record(1))
            await until(lambda: bool(book.records))

    run(work())


def test_each_record_reaches_the_parts_once_though_the_observer_dies_twice(tmp_path: Path):
    async def work() -> None:
        seen: list[str] = []
        async with linked(tmp_path / "o") as link:
            for life in range(3):
                book = Book()
                async with observing(tmp_path / "o", book):
                    for number in range(10):
                        link.ended(record(10 * life + number))
                    await until(lambda book=book, life=life: len(book.records) >= 10)
                    await until(lambda: not link._unkept)
                seen += [r.request_id for r in book.records]
        assert seen == [record(number).request_id for number in range(30)]

    run(work())


def test_a_disk_that_takes_nothing_is_said_once_and_again_after_it_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def work() -> None:
        book = Book("ledger")
        observer = Observer(tmp_path / "o", [book.part], flush_interval_s=1.0)
        for keeps in (False, False, True, True, False, False):
            book.keeps = keeps
            await observer._flush()
        assert observer._num_faults["ledger"] == 4
        assert [news.kind for news in book.news] == ["part_failed"]  # one in a minute

    run(work())
    said = [record.message for record in caplog.records]
    assert said == [
        "the observer's ledger cannot do its work: the disk is full",
        "the observer's ledger does its work again",
        "the observer's ledger cannot do its work: the disk is full",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_a_mistake_is_logged_although_the_disk_has_failed_just_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def work() -> None:
        book = Book("ledger", fails=True)  # neither keeps nor takes
        observer = Observer(tmp_path / "o", [book.part], flush_interval_s=1.0)
        await observer._flush()
        for number in (1, 2):
            report = Report(worker=0, life="a", number=number, ended=[record(number)])
            observer._take(report)
        assert [news.kind for news in book.news] == ["part_failed"]

    run(work())
    assert [record.exc_info is not None for record in caplog.records] == [False, True]


def test_what_no_observer_kept_is_sent_to_the_next(tmp_path: Path):
    async def work() -> None:
        async with linked(tmp_path / "o") as link:
            failing = Book("ledger")
            failing.keeps = False  # it takes the record, and cannot keep it
            async with observing(tmp_path / "o", failing) as observer:
                link.ended(record(1))
                await until(lambda: len(failing.records) == 1)
                faults = observer._num_faults["ledger"]
                await until(lambda: observer._num_faults["ledger"] > faults)
            book = Book()
            async with observing(tmp_path / "o", book):
                await until(lambda: len(book.records) >= 1)
        assert [r.request_id for r in book.records] == [record(1).request_id]

    run(work())


def test_a_fault_of_one_part_is_counted_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def work() -> None:
        bad, good = Book("bad", fails=True), Book("good")
        async with observing(tmp_path / "o", bad, good), linked(tmp_path / "o") as link:
            for number in range(5):
                link.ended(record(number))
            await until(lambda: len(good.records) == 5)
            text = (await link.ask(Question(id=0, name=METRICS))).body.decode()
            faults = next(line for line in text.splitlines() if 'part="bad"' in line)
            assert float(faults.split()[-1]) >= 5
            assert 'jaxserve_observer_faults_total{part="good"} 0.0' in text
            assert "jaxserve_observer_requests_total 5.0" in text

    run(work())
    assert sum("bad failed" in line for line in caplog.text.splitlines()) == 1  # not once a record


def test_a_tick_that_waits_delays_no_other_part(tmp_path: Path):
    ticked = asyncio.Event()

    async def wait() -> None:
        await asyncio.Event().wait()

    async def tick() -> None:
        ticked.set()

    async def work() -> None:
        parts = [Part(name="database", tick=wait), Part(name="alerts", tick=tick)]
        observer = Observer(tmp_path / "o", parts, flush_interval_s=0.01)
        await observer.start()
        try:
            async with asyncio.timeout(5):
                await ticked.wait()
        finally:
            await observer.close()

    run(work())


def test_a_question_is_answered_with_all_that_ended_before_it(tmp_path: Path):
    async def work() -> None:
        book = Book()
        async with observing(tmp_path / "o", book), linked(tmp_path / "o") as link:
            await until(lambda: link._writer is not None)
            link.ended(record(1))
            question = Question(id=0, name="book", query={"a": "b"}, tenant="acme")
            others = (link.ask(Question(id=0, name=name)) for name in ("nobody", "usage"))
            answers = await asyncio.gather(link.ask(question), *others)
            assert answers[0].body == b"1 acme {'a': 'b'}"
            assert answers[1].status == 500 and b"nobody" in answers[1].body
            assert answers[2].status == 503 and b"metering.enabled=true" in answers[2].body

    run(work())


def test_a_question_that_the_observer_dies_over_is_refused_at_once(tmp_path: Path):
    async def work() -> None:
        book = Book()
        asked = asyncio.Event()

        async def never(question: Question) -> Answer:
            asked.set()
            await asyncio.Event().wait()
            return Answer()

        book.part = dataclasses.replace(book.part, asks={"book": never})
        async with linked(tmp_path / "o") as link:
            async with observing(tmp_path / "o", book):
                await until(lambda: link._writer is not None)
                answer = asyncio.create_task(link.ask(Question(id=0, name="book")))
                await asked.wait()
            with pytest.raises(Overloaded, match="not there"):
                async with asyncio.timeout(10):
                    await answer

    run(work())


def test_what_is_told_reaches_workers_that_come_later(tmp_path: Path):
    async def work() -> None:
        async with observing(tmp_path / "o") as observer:
            observer.tell("budgets", b"[1]")
            async with linked(tmp_path / "o") as link:
                await until(lambda: link.told("budgets") == b"[1]")
                observer.tell("budgets", b"[2]")
                await until(lambda: link.told("budgets") == b"[2]")

    run(work())


def test_without_an_observer_nothing_waits_and_the_oldest_are_dropped(tmp_path: Path):
    async def work() -> None:
        async with linked(tmp_path / "o", max_records=100) as link:
            with pytest.raises(Overloaded, match="not there"):
                await link.ask(Question(id=0, name="book"))
            for number in range(50):
                for part in range(10):
                    link.ended(record(10 * number + part))
                link._send_report()
            assert link.num_dropped == 400
            book = Book()
            async with observing(tmp_path / "o", book) as observer:
                await until(lambda: len(book.records) == 100)
                assert book.records[0].request_id == record(400).request_id
                link.ended(record(500))
                await until(lambda: len(book.records) == 101)
                assert observer._num_dropped.popitem()[1] == 400

    run(work())


def test_without_a_reporter_a_question_is_refused_with_the_remedy():
    with pytest.raises(Overloaded, match=r"telemetry\.enabled"):
        asyncio.run(NoReporter().ask(Question(id=0, name="slo")))


def test_a_frame_that_is_no_message_ends_its_connection_only(tmp_path: Path):
    async def work() -> None:
        book = Book()
        async with observing(tmp_path / "o", book), linked(tmp_path / "o") as link:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "o")
            writer.write(b"\x03\x00\x00\x00abc")
            assert await reader.read() == b""
            writer.close()
            link.ended(record(1))
            await until(lambda: len(book.records) == 1)

    run(work())
