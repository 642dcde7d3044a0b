"""The engine's turn: what one step of delay means, clients that vanish, faults, the watchdog."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable

import pytest

from jaxserve.config import CacheConfig, Config, SchedulerConfig
from jaxserve.engine.loop import Engine
from jaxserve.engine.process import build_engine, watch_steps
from jaxserve.protocol.messages import (
    Cancel,
    ClientMessage,
    Drain,
    EngineMessage,
    Finished,
    GetStatus,
    Goodbye,
    Submit,
    TokenEvents,
    TokenSegment,
)
from jaxserve.protocol.server import Arrival
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.types import FinishReason, SamplingParams
from tests.fakes.engine import PAGE_BYTES, fake_parts, oracle
from tests.fakes.executor import ECHO, FakeExecutor

CONFIG = Config(
    cache=CacheConfig(page_size=4, num_pages=100),
    scheduler=SchedulerConfig(max_rows=4, max_step_tokens=16, decode_steps=1),
)


class ListServer:
    """A transport that a test fills and reads; sending to a lost client reports it, as ZeroMQ's."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.sent: list[tuple[Hashable, EngineMessage]] = []
        self.lost: set[Hashable] = set()

    def receive(self, timeout_s: float) -> list[Arrival]:
        arrivals, self.arrivals = self.arrivals, []
        return arrivals

    def send(self, client: Hashable, message: EngineMessage) -> None:
        if client in self.lost:
            self.arrivals.append((client, Goodbye()))
        else:
            self.sent.append((client, message))

    def close(self) -> None:
        pass

    def tokens(self, client: Hashable, sequence_id: int) -> list[int]:
        """All tokens sent to a client for a sequence."""
        return [
            token
            for to, message in self.sent
            if to == client and isinstance(message, TokenEvents)
            for number, tokens in zip(message.sequence_ids, message.token_ids, strict=True)
            if number == sequence_id
            for token in tokens
        ]

    def ends(self, client: Hashable) -> list[Finished]:
        """All ends sent to a client."""
        events = [m for to, m in self.sent if to == client and isinstance(m, TokenEvents)]
        return [finished for event in events for finished in event.finished]


@pytest.fixture
def server() -> ListServer:
    """The transport."""
    return ListServer()


@pytest.fixture
def engine(server) -> Engine:
    """An engine over the fake device."""
    return build_engine(CONFIG, server, fake_parts(CONFIG, lambda *_: None))


def submit(sequence_ids: list[int], prompt: list[int], **sampling) -> Submit:
    """A request."""
    params = SamplingParams(**{"max_tokens": 10, "seed": 1, "ignore_eos": True} | sampling)
    return Submit(
        sequence_ids=sequence_ids,
        prompt=[TokenSegment(token_ids=prompt[:2]), TokenSegment(token_ids=prompt[2:])],
        sampling=params,
        arrived_ns=1,
    )


def turn(engine: Engine, client: Hashable = "a", *messages: ClientMessage) -> None:
    """One turn of the loop, after these messages of a client."""
    engine._server.arrivals += [(client, message) for message in messages]  # type: ignore[attr]
    engine.receive(0)
    engine.step()


def test_who_is_shed_is_told_why_and_it_is_counted(server):
    config = dataclasses.replace(
        CONFIG, scheduler=SchedulerConfig(max_rows=1, max_step_tokens=16, max_waiting=1)
    )
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    turn(engine, "a", submit([1], [5, 6]))
    turn(engine, "b", dataclasses.replace(submit([1], [7, 8]), priority=10))
    turn(engine, "c", submit([1], [9, 9]))
    turn(engine, "d", submit([1], [9, 8]))
    (shed,), (refused,) = server.ends("b"), server.ends("d")
    assert (shed.reason, shed.error_code) == (FinishReason.ERROR, "overloaded")
    assert "better priority" in shed.error and shed.record.output_tokens == 0
    assert refused.error_code == "overloaded"
    assert engine.status().shed == {"priority": 1, "queue_full": 1}
    assert (shed.retry_after_s, refused.retry_after_s) == pytest.approx((1, 2), abs=0.1)
    for _ in range(40):
        turn(engine)
    assert [server.ends(client)[0].reason for client in "ac"] == [FinishReason.LENGTH] * 2
    assert not engine._live.of("b")


def test_an_idle_time_before_a_prompt_is_not_its_steps(engine):
    turn(engine, "a", submit([1], [5, 6], max_tokens=1))
    while engine.in_flight is not None:
        turn(engine)
    engine._backlog._last_ns -= 900_000_000
    turn(engine, "a", submit([2], [7] * 14, max_tokens=1))
    turn(engine)
    assert engine.status().prefill_tokens_per_s > 100  # it would be below 18


def test_measured_steps_pace_the_next(server):
    scheduler = SchedulerConfig(max_rows=4, max_step_tokens=200, decode_steps=1, max_step_ms=10.0)
    config = dataclasses.replace(CONFIG, scheduler=scheduler)
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    collect = engine.executor.collect

    def timed(launched):
        outputs = collect(launched)
        outputs[0].device_ns = 1_000_000 * len(outputs[0].token_ids[0])
        return outputs

    chunks = []
    plan = engine.scheduler.plan

    def watched():
        plans = plan()
        chunks.append(sum(len(c.token_ids) for p in plans or () if p for c in p.chunks))
        return plans

    engine.executor.collect = timed  # type: ignore[method-assign]
    engine.scheduler.plan = watched  # type: ignore[method-assign]
    turn(engine, "a", submit([1], [5, 6], max_tokens=300))
    turn(engine, "a", submit([2], [7] * 190, max_tokens=5))
    for _ in range(310):
        turn(engine)
    assert len(server.tokens("a", 1)) == 300 and len(server.tokens("a", 2)) == 5
    assert sum(chunks) == 192 and max(chunks) < 100  # cut, though a step holds it whole


def calls(engine: Engine) -> int:
    """Device calls so far."""
    assert isinstance(engine.executor, FakeExecutor)
    return len(engine.executor.calls)


def test_tokens_come_one_turn_after_their_launch(engine, server):
    request = submit([1], [5, 6, 7], max_tokens=3)
    turn(engine, "a", request)
    assert calls(engine) == 1 and not server.sent
    turn(engine)
    expected = oracle([5, 6, 7], request.sampling)
    assert calls(engine) == 2 and server.tokens("a", 1) == expected[:1]
    turn(engine)
    turn(engine)
    assert server.tokens("a", 1) == expected
    assert calls(engine) == 3  # nothing is launched beyond max_tokens
    assert [end.reason for end in server.ends("a")] == [FinishReason.LENGTH]
    assert engine.in_flight is None and not engine.scheduler.has_work


def test_one_message_a_client_a_step(engine, server):
    turn(engine, "a", submit([1, 2], [5]), submit([3], [6]))
    turn(engine, "b", submit([1], [7]))
    for _ in range(3):
        turn(engine)
    server.sent.clear()
    turn(engine)
    assert sorted(client for client, _ in server.sent) == ["a", "b"]


def test_a_vanished_client_frees_its_pages_within_two_calls(engine, server):
    turn(engine, "a", submit([1, 2], [5] * 9, max_tokens=50), submit([3], [5] * 40))
    turn(engine, "b", submit([1], [7, 8], max_tokens=30))
    for _ in range(4):
        turn(engine)
    server.lost.add("a")
    used, called = engine.scheduler.pages_used, calls(engine)
    while engine.scheduler.pages_used >= used - 5:
        turn(engine)
    assert calls(engine) <= called + 2
    assert engine.scheduler.num_running == 1 and engine.scheduler.num_waiting == 0
    while engine.scheduler.has_work:
        turn(engine)
    params = submit([1], [7, 8], max_tokens=30).sampling
    assert server.tokens("b", 1) == oracle([7, 8], params)


def test_cancel_reports_its_reason_once_and_at_once(engine, server):
    turn(engine, "a", submit([1], [5, 6], max_tokens=50))
    for _ in range(5):
        turn(engine)
    server.sent.clear()
    stop = Cancel(sequence_ids=[1, 77], reason=FinishReason.STOP)
    turn(engine, "b", Cancel(sequence_ids=[1]))  # another client's ids are its own
    assert not server.ends("a")
    turn(engine, "a", stop, stop, Cancel(sequence_ids=[1]))
    (end,) = server.ends("a")
    assert end.reason is FinishReason.STOP
    # Two steps were launched and unread when the cancel came, or were read in the same turn.
    assert end.record.discarded_tokens == 1
    emitted = end.record.output_tokens
    while engine.scheduler.has_work:
        turn(engine)
    assert len(server.ends("a")) == 1
    assert end.record.computed_tokens == 2 + emitted  # its last token's successor was under way
    assert engine.scheduler.pages_used == 0


def test_a_reused_sequence_id_harms_nobody(engine, server):
    turn(engine, "a", submit([1], [5, 6]), submit([1], [9]), submit([2, 2], [9]))
    while engine.scheduler.has_work:
        turn(engine)
    assert server.tokens("a", 1) == oracle([5, 6], submit([1], [5]).sampling)
    errors = [end for end in server.ends("a") if end.reason is FinishReason.ERROR]
    assert [end.error_code for end in errors] == ["invalid_value"] * 2


def test_step_statistics_add_up(server):
    """A pool of 11 pages: rows are set back, and each time is told once."""
    config = dataclasses.replace(CONFIG, cache=CacheConfig(page_size=4, num_pages=12))
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    requests = [submit([i], [5 + i] * 6, max_tokens=20) for i in range(4)]
    turn(engine, "a", GetStatus(stats=True), *requests)
    while engine.scheduler.has_work:
        turn(engine)
    stats = [message for _, message in server.sent if isinstance(message, StepStats)]
    records = [end.record for end in server.ends("a")]
    preemptions = sum(record.preemptions for record in records)
    assert preemptions > 0
    assert sum(step.preemptions for step in stats) == preemptions
    assert [step.step_id for step in stats] == list(range(calls(engine)))
    positions = sum(record.computed_tokens + record.recomputed_tokens for record in records)
    assert sum(step.tokens for step in stats) == positions
    assert all(step.tokens == step.decode_tokens + step.prefill_tokens for step in stats)
    assert stats[-1].pages_total == 11 and stats[-1].pages_used == 0


def test_what_the_host_keeps_is_told(server):
    """Few pages and a host store: nothing is computed twice, and each page's way is counted."""
    cache = CacheConfig(
        page_size=4,
        num_pages=12,
        host_bytes=20 * PAGE_BYTES,
        preemption="swap",
        prefix=False,
    )
    config = dataclasses.replace(CONFIG, cache=cache)
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    requests = [submit([i], [5 + i] * 6, max_tokens=20) for i in range(4)]
    turn(engine, "a", GetStatus(stats=True), *requests)
    assert engine.status().host_pages_total == 20
    swapped = 0
    while engine.scheduler.has_work:
        turn(engine)
        status = engine.status()
        swapped = max(swapped, status.swapped)
        assert (status.host_pages_used > 0) is (status.swapped > 0)
    stats = [message for _, message in server.sent if isinstance(message, StepStats)]
    records = [end.record for end in server.ends("a")]
    assert swapped > 0 and sum(record.recomputed_tokens for record in records) == 0
    assert sum(record.swapped_tokens for record in records) > 10
    saved = sum(step.pages_saved for step in stats)
    assert saved == sum(step.pages_loaded for step in stats) > 4
    for i, request in enumerate(requests):
        assert server.tokens("a", i) == oracle([5 + i] * 6, request.sampling)


def test_a_client_that_leaves_frees_its_pages_on_the_host(server):
    cache = CacheConfig(page_size=4, num_pages=12, host_bytes=20 * PAGE_BYTES, preemption="swap")
    config = dataclasses.replace(CONFIG, cache=cache)
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    turn(engine, "a", submit([0], [5] * 6, max_tokens=30))
    turn(engine, "b", submit([0, 1], [6] * 6, max_tokens=30))
    while not engine.scheduler.num_swapped:
        assert engine.scheduler.has_work
        turn(engine)
    turn(engine, "b", Goodbye())
    assert engine.scheduler.num_swapped == engine.scheduler.host_pages_used == 0
    while engine.scheduler.has_work:
        turn(engine)
    assert server.tokens("a", 0) == oracle([5] * 6, submit([0], [5], max_tokens=30).sampling)


def test_a_refusal_names_the_field(engine, server):
    turn(engine, "a", submit([1], [5], temperature=-1.0), submit([2], [5] * 3000))
    errors = {end.sequence_id: (end.error_code, end.error_param) for end in server.ends("a")}
    assert errors == {
        1: ("invalid_value", "temperature"),
        2: ("out_of_pages", "max_tokens"),
    }


def test_drain_ends_what_runs_and_refuses_the_rest(engine, server):
    turn(engine, "a", submit([1], [5, 6]))
    turn(engine, "a", Drain(), submit([2], [5, 6]))
    while engine.scheduler.has_work:
        turn(engine)
    by_id = {end.sequence_id: end for end in server.ends("a")}
    assert by_id[1].reason is FinishReason.LENGTH
    assert by_id[2].error_code == "overloaded"
    assert engine.status().state == "draining"


def test_a_fault_ends_every_sequence_and_says_so(engine, server):
    assert isinstance(engine.executor, FakeExecutor)
    engine.executor.fail_at = 3
    server.arrivals += [
        ("a", GetStatus()),
        ("a", submit([1, 2], [5])),
        ("b", submit([1], [6] * 40)),
    ]
    with pytest.raises(RuntimeError, match="told to fail"):
        engine.serve()
    assert [end.reason for end in server.ends("a")] == [FinishReason.ERROR] * 2
    assert [end.error_code for end in server.ends("b")] == ["engine_failure"]
    status = [m for _, m in server.sent if isinstance(m, EngineStatus)][-1]
    assert status.state == "failed" and "told to fail" in status.error


def test_the_watchdog_tells_a_hung_step(engine):
    hung = threading.Event()
    engine.step_ns -= int(60e9)
    watch_steps(engine, 30.0, lambda age_s: hung.set() if age_s >= 60 else None)
    assert hung.wait(10)


def test_drafts_are_told_in_statistics_and_records(server):
    """One row that repeats itself: drafts count as decoded, not as prompt."""
    engine = build_engine(CONFIG, server, fake_parts(CONFIG, lambda *_: None))
    request = submit([1], [5, 6, 7, 8, 9], max_tokens=90, top_k=ECHO)
    turn(engine, "a", GetStatus(stats=True), request)
    while engine.scheduler.has_work:
        turn(engine)
    assert server.tokens("a", 1) == oracle([5, 6, 7, 8, 9], request.sampling)
    stats = [message for _, message in server.sent if isinstance(message, StepStats)]
    (end,) = server.ends("a")
    drafted = sum(step.draft_tokens for step in stats)
    accepted = sum(step.draft_accepted_tokens for step in stats)
    assert drafted == end.record.drafted_tokens > accepted > 30
    assert sum(step.prefill_tokens for step in stats) == 5
    assert sum(step.decode_tokens for step in stats) == 89 + drafted - accepted
    assert end.record.discarded_tokens == drafted - accepted
