"""What a sequence waited for, and whose trace it is in, as its record says."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from jaxserve.config import CacheConfig, LoraConfig, SchedulerConfig
from jaxserve.engine.held import HeldRequests
from jaxserve.engine.loop import Engine
from jaxserve.engine.process import build_engine
from jaxserve.protocol.messages import (
    AdapterRef,
    Cancel,
    Interval,
    SequenceRecord,
    Submit,
    UseVocabulary,
)
from jaxserve.structured import grammars
from jaxserve.types import FinishReason
from tests.engine.test_loop import CONFIG, ListServer, submit, turn
from tests.engine.test_probation import Bench, C, request
from tests.fakes.engine import PAGE_BYTES, fake_parts
from tests.fakes.grammar import vocabulary
from tests.http.test_adapters import written

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


def traced(message: Submit, number: int = 11) -> Submit:
    """The same, in a trace of its own."""
    return dataclasses.replace(message, traceparent=f"00-{number:032x}-{'b' * 16}-01")


def until_ended(engine: Engine, server: ListServer, num_ends: int) -> list[SequenceRecord]:
    """Turns until so many sequences have ended; their records by sequence id."""
    deadline_s = time.monotonic() + 60
    while len(server.ends("a")) < num_ends:
        assert time.monotonic() < deadline_s
        turn(engine)
    return [end.record for end in sorted(server.ends("a"), key=lambda end: end.sequence_id)]


def check(record: SequenceRecord, *kinds: str) -> None:
    """These waits, in order, within the sequence's life."""
    assert [interval.kind for interval in record.intervals] == list(kinds)
    for interval in record.intervals:
        assert 0 < interval.start_ns <= interval.end_ns <= record.done_ns


@pytest.fixture
def server() -> ListServer:
    return ListServer()


def test_each_record_has_the_trace_that_it_was_submitted_in(server) -> None:
    engine = build_engine(CONFIG, server, fake_parts(CONFIG, lambda *_: None))
    long = submit([5], [9] * 5000)  # refused
    for number in range(1, 5):
        turn(engine, "a", traced(submit([number], [5, number]), number))
    turn(engine, "a", traced(long, 5), Cancel(sequence_ids=[4]))
    records = until_ended(engine, server, 5)
    for number, record in enumerate(records, 1):
        assert record.traceparent == f"00-{number:032x}-{'b' * 16}-01"
        assert record.pid == os.getpid()
        check(record)


@pytest.mark.parametrize(("host_pages", "kind"), [(0, "preempted"), (50, "swapped")])
def test_a_sequence_that_was_set_back_says_for_how_long(server, host_pages, kind) -> None:
    cache = CacheConfig(
        page_size=4,
        num_pages=11,
        host_bytes=host_pages * PAGE_BYTES,
        preemption="swap",
        prefix=False,
    )
    scheduler = SchedulerConfig(max_rows=2, max_step_tokens=16, decode_steps=1)
    config = dataclasses.replace(CONFIG, cache=cache, scheduler=scheduler)
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    for number in (1, 2):
        turn(engine, "a", submit([number], [6 + number] * 4, max_tokens=24))
    first, second = until_ended(engine, server, 2)
    check(first)
    check(second, kind)
    assert second.preemptions == 1
    (wait,) = second.intervals
    assert second.first_token_ns < wait.start_ns < wait.end_ns < second.done_ns


def test_one_that_ends_while_it_is_set_back_waited_until_then(server) -> None:
    cache = CacheConfig(page_size=4, num_pages=11, host_bytes=0, prefix=False)
    scheduler = SchedulerConfig(max_rows=2, max_step_tokens=16, decode_steps=1)
    config = dataclasses.replace(CONFIG, cache=cache, scheduler=scheduler)
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    for number in (1, 2):
        turn(engine, "a", submit([number], [6 + number] * 4, max_tokens=24))
    while not engine.scheduler.num_preemptions:
        turn(engine)
    turn(engine, "a", Cancel(sequence_ids=[2]))
    record = server.ends("a")[0].record
    check(record, "preempted")
    assert record.intervals[0].end_ns == record.done_ns


def test_a_request_on_trial_was_held() -> None:
    bench = Bench((C,))
    bench.turn(request(1, "f" * 16, max_tokens=4), request(3, C))
    bench.until(lambda: len(bench.server.ends("a")) == 2)
    one, other = sorted(bench.server.ends("a"), key=lambda end: end.sequence_id)
    check(one.record, "held")
    check(other.record, "held")  # until its trial began
    assert other.record.intervals[0].end_ns < one.record.intervals[0].end_ns


def test_a_request_with_a_grammar_waited_for_it(server) -> None:
    engine = build_engine(CONFIG, server, fake_parts(CONFIG, lambda *_: None))
    engine.handle("a", UseVocabulary(vocabulary=vocabulary()))
    message = submit([1], [5, 6], grammar=grammars.regex("[0-9]{3,6}"), ignore_eos=False)
    turn(engine, "a", message)
    (record,) = until_ended(engine, server, 1)
    check(record, "grammar")
    assert record.intervals[0].end_ns <= record.queued_ns


def test_a_request_with_an_adapter_waited_for_it_and_for_a_slot(server, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lora=LoraConfig(enabled=True, classes=("4x1",)))
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    for number in (1, 2):
        key = written(tmp_path / f"{number}", number)
        message = submit([number], [5, 6])
        ref = AdapterRef(key=key, path=str(tmp_path / f"{number}"))
        turn(engine, "a", dataclasses.replace(message, adapter=ref))
        while engine._adapters.is_loading:
            engine.receive(0.01)  # no step: the first must still run when the second is there
    first, second = until_ended(engine, server, 2)
    check(first, "adapter")
    check(second, "adapter", "adapter")  # the file, then the one slot
    loaded, parked = second.intervals
    assert loaded.end_ns <= parked.start_ns < first.done_ns


def test_what_waits_is_told_by_the_clock_also_where_it_is_withdrawn() -> None:
    now_ns = [100]
    held: HeldRequests[Submit] = HeldRequests("grammar", lambda: now_ns[0])
    replayed = Interval(kind="replay", start_ns=1, end_ns=2)
    several = dataclasses.replace(submit([1, 2], [5, 6]), traceparent=PARENT, waited=[replayed])
    held.add("a", several)
    now_ns[0] = 150
    held.add("a", submit([3], [5, 6]))
    now_ns[0] = 170
    ((_, end),) = held.withdraw("a", [2], FinishReason.CANCELLED)
    assert end.record.intervals == [
        replayed,
        Interval(kind="grammar", start_ns=100, end_ns=170),
    ]
    assert (end.record.traceparent, end.record.done_ns) == (PARENT, 170)
    now_ns[0] = 300
    waits = [message.waited for _, message in held.take(lambda message: True)]
    assert waits == [
        [replayed, Interval(kind="grammar", start_ns=100, end_ns=300)],
        [Interval(kind="grammar", start_ns=150, end_ns=300)],
    ]
