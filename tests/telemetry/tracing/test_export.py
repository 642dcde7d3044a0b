"""The queue of spans: bounded, counted, and nobody waits for the collector."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import pytest

from jaxserve.telemetry.tracing import export as module
from jaxserve.telemetry.tracing.export import MAX_ATTEMPTS, Export
from jaxserve.telemetry.tracing.spans import Span


class Collector:
    """Takes spans, or not, when it is told to.

    Attributes:
        open: cleared, it holds each call.
        verdicts: whether it takes each call's spans; True when it has run out.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []
        self.verdicts: Iterator[bool | Exception] = iter(())
        self.open = threading.Event()
        self.open.set()
        self.changed = threading.Condition()
        self.num_calls = 0

    def send(self, spans: Sequence[Span], offset_ns: int) -> bool:
        with self.changed:
            self.num_calls += 1
            self.changed.notify_all()
        self.open.wait()
        verdict = next(self.verdicts, True)
        if isinstance(verdict, Exception):
            raise verdict
        if verdict:
            with self.changed:
                self.batches.append(([span.name for span in spans], offset_ns))
                self.changed.notify_all()
        return verdict

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 20)

    @property
    def names(self) -> list[str]:
        """Of all spans it took."""
        return [name for names, _ in self.batches for name in names]


def trace(name: str, num_spans: int = 1) -> list[Span]:
    """Spans of a request."""
    one = Span(trace_id="a" * 32, span_id="b" * 16, parent_id="", name=name, start_ns=1, end_ns=2)
    return [one] * num_spans


def exporting(collector: Collector, max_spans: int = 1000, pause_s: float = 0.0) -> Export:
    """An export that is not started yet."""
    return Export(collector.send, collector.open.set, max_spans, "there", pause_s=pause_s)


@pytest.fixture(autouse=True)
def _no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_S", 0.0)


def test_all_that_is_offered_is_sent_in_its_order_with_its_clock() -> None:
    collector = Collector()
    export = exporting(collector)
    for number in range(300):
        export.offer(trace(f"{number}", 3), offset_ns=number // 100)
    assert export.num_waiting == 900
    export.start()
    export.close(20)
    assert collector.names == [f"{number}" for number in range(300) for _ in range(3)]
    for names, offset_ns in collector.batches:
        assert {int(name) // 100 for name in names} == {offset_ns}
    assert (export.num_sent, export.num_waiting, sum(export.dropped.values())) == (900, 0, 0)


def test_with_a_collector_that_does_not_answer_the_oldest_are_dropped_and_counted() -> None:
    collector = Collector()
    collector.open.clear()
    export = exporting(collector, max_spans=100)
    export.start()
    export.offer(trace("first", 10), 0)
    collector.wait(lambda: collector.num_calls == 1)  # it holds the first
    for number in range(1000):
        export.offer(trace(f"{number}", 10), 0)  # returns at once, or this test would not end
        assert export.num_waiting <= 100
    assert export.dropped == {"full": 10_000 - 90, "refused": 0}
    collector.open.set()
    export.close(20)
    assert collector.names[::10] == ["first", *(f"{number}" for number in range(991, 1000))]
    assert export.num_sent + sum(export.dropped.values()) == 10_010


def test_a_trace_larger_than_the_queue_is_dropped_alone() -> None:
    collector = Collector()
    export = exporting(collector, max_spans=100)
    export.offer(trace("small", 5), 0)
    export.offer(trace("large", 101), 0)
    export.start()
    export.close(20)
    assert collector.names == ["small"] * 5
    assert export.dropped == {"full": 101, "refused": 0}


def test_a_batch_is_tried_again_and_then_given_up(caplog: pytest.LogCaptureFixture) -> None:
    collector = Collector()
    refusals = [False, RuntimeError("as libraries do"), *[False] * (MAX_ATTEMPTS - 2)]
    collector.verdicts = iter([*refusals, False, True])
    export = exporting(collector)
    export.start()
    export.offer(trace("lost"), 0)
    collector.wait(lambda: collector.num_calls == MAX_ATTEMPTS)
    export.offer(trace("late"), 0)
    collector.wait(lambda: bool(collector.batches))
    export.close(20)
    assert collector.names == ["late"]
    assert collector.num_calls == MAX_ATTEMPTS + 2
    assert (export.num_sent, dict(export.dropped)) == (1, {"full": 0, "refused": 1})
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("takes no spans" in line for line in said) == 1  # not at each attempt
    assert sum("takes spans again" in line for line in said) == 1


def test_the_end_waits_a_moment_only() -> None:
    collector = Collector()
    collector.open.clear()
    ended = threading.Event()
    export = Export(collector.send, ended.set, 1000, "there")
    export.start()
    export.offer(trace("held", 3), 0)
    collector.wait(lambda: collector.num_calls == 1)
    export.offer(trace("waiting", 4), 0)
    export.close(farewell_s=0.01)
    assert ended.is_set()  # the one that is sent was told to stop
    assert export.dropped["refused"] == 4 and export.num_waiting == 3
    collector.open.set()
    export._thread.join(20)
    assert not export._thread.is_alive() and export.num_sent == 3


def test_the_end_does_not_sit_out_a_pause() -> None:
    collector = Collector()
    collector.verdicts = iter([False])
    export = exporting(collector, pause_s=3600)
    export.start()
    export.offer(trace("refused"), 0)
    collector.wait(lambda: collector.num_calls == 1)
    export.close(20)
    assert not export._thread.is_alive()
    assert export.dropped["refused"] == 1
