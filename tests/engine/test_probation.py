"""Requests on trial: who runs when, who waits, and what becomes of those that wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest

from jaxserve.engine.loop import Engine
from jaxserve.engine.probation import ARRIVAL_S, Probation
from jaxserve.engine.process import build_engine
from jaxserve.engine.recorder import NoRecorder
from jaxserve.protocol.messages import Cancel, Goodbye, Submit
from jaxserve.types import FinishReason
from tests.engine.test_loop import CONFIG, ListServer, submit, turn
from tests.fakes.engine import fake_parts, oracle

A, B, C, D = (f"{number:016x}" for number in (10, 11, 12, 13))
TOKENS = 4


class Trials(NoRecorder):
    """Notes what the flight recorder is told."""

    def __init__(self) -> None:
        self.told: list[tuple[set[int], int]] = []

    def trying(self, requests: Iterable[int], trials_done: int) -> None:
        self.told.append((set(requests), trials_done))


class Bench:
    """An engine whose requests are on trial, with a clock of its own."""

    def __init__(self, *trials: tuple[str, ...], quarantined: tuple[str, ...] = ()) -> None:
        self.now_s = 0.0
        self.server = ListServer()
        self.recorder = Trials()
        self.probation = Probation(
            trials, quarantined, TOKENS, self.recorder, clock_s=lambda: self.now_s
        )
        parts = fake_parts(CONFIG, lambda *_: None)
        self.engine: Engine = build_engine(
            CONFIG, self.server, parts, self.recorder, self.probation
        )

    def turn(self, *messages, client: str = "a") -> None:
        turn(self.engine, client, *messages)

    def begun(self) -> set[int]:
        """Sequence ids that have got tokens."""
        return {number for number in range(1, 9) if self.server.tokens("a", number)}

    def until(self, condition) -> None:
        for _ in range(200):
            if condition():
                return
            self.turn()
        raise AssertionError("it does not come")


def request(number: int, key: str, **values) -> Submit:
    """A request of one sequence, replayed."""
    priority = values.pop("priority", 0)
    message = submit([number], [5, number], max_tokens=values.pop("max_tokens", 30), **values)
    return dataclasses.replace(message, request_key=key, attempt=1, priority=priority)


def test_groups_run_one_after_another_and_the_first_alone() -> None:
    bench = Bench((A, B), (C,))
    bench.turn(request(4, D), request(3, C), request(1, A))
    assert bench.engine.scheduler.num_running == 0  # B has not come
    bench.turn(request(2, B))
    bench.until(lambda: len(bench.server.tokens("a", 2)) >= TOKENS - 1)
    assert bench.begun() == {1, 2}
    assert bench.engine.status().waiting == 2
    bench.until(lambda: bench.begun() == {1, 2, 3, 4})
    assert len(bench.server.tokens("a", 1)) < 30  # it ran on beside the next trial
    bench.until(lambda: not bench.engine.scheduler.has_work)
    told = [({int(key, 16) for key in keys}, done) for keys, done in (((A, B), 0), ((), 1))]
    assert bench.recorder.told == [*told, ({12}, 1), (set(), 2)]
    for number in range(1, 5):
        params = request(number, A).sampling
        assert bench.server.tokens("a", number) == oracle([5, number], params)
    bench.turn(request(5, f"{99:016x}"))
    assert bench.engine.scheduler.num_running == 1  # nothing is held any more


def test_who_does_not_come_is_not_waited_for() -> None:
    bench = Bench((A, B), (C,))
    bench.turn(request(2, B), request(4, D))
    bench.now_s = ARRIVAL_S / 2
    bench.turn()
    assert bench.engine.scheduler.num_running == 0
    bench.now_s = 2 * ARRIVAL_S
    bench.turn()
    assert bench.engine.scheduler.num_running == 1
    bench.until(lambda: 4 in bench.begun())
    bench.turn(request(1, A))  # comes late: a trial of its own, or with the next
    bench.now_s += 2 * ARRIVAL_S
    bench.until(lambda: 1 in bench.begun())
    assert ({int(A, 16), int(C, 16)}, 1) in bench.recorder.told
    bench.until(lambda: not bench.engine.scheduler.has_work)
    bench.turn(request(3, C))
    bench.until(lambda: 3 in bench.begun())
    assert bench.recorder.told[-2:] == [({int(C, 16)}, 2), (set(), 3)] or bench.recorder.told[
        -1
    ] == ({int(C, 16)}, 2)


def test_who_waits_can_be_cancelled_and_its_client_can_leave() -> None:
    bench = Bench((A,))
    two = submit([5, 6], [1, 2])
    emitted = [oracle([1, 2], two.sampling, choice)[:size] for choice, size in ((0, 1), (3, 2))]
    two = dataclasses.replace(two, request_key=D, attempt=1, choices=[0, 3], emitted=emitted)
    bench.turn(two, request(4, C))
    bench.turn(Cancel(sequence_ids=[5, 4], reason=FinishReason.STOP))
    ends = {end.sequence_id: end for end in bench.server.ends("a")}
    assert ends.keys() == {4, 5} and ends[5].reason is FinishReason.STOP
    assert (ends[5].record.output_tokens, ends[5].record.context_tokens) == (1, 3)
    bench.turn(request(1, A), client="b")
    bench.turn(request(8, B), client="b")
    bench.turn(Goodbye(), client="b")
    bench.until(lambda: not bench.engine.scheduler.has_work and bench.server.tokens("a", 6) != [])
    bench.until(lambda: not bench.engine.scheduler.has_work)
    assert [*emitted[1], *bench.server.tokens("a", 6)] == oracle([1, 2], two.sampling, 3)
    assert bench.begun() == {6} and not bench.server.tokens("b", 8)


def test_what_is_quarantined_is_refused_by_name() -> None:
    bench = Bench((A,), quarantined=(B,))
    bench.turn(request(2, B))
    (end,) = bench.server.ends("a")
    assert end.reason is FinishReason.ERROR and end.error_code == "request_quarantined"


@pytest.mark.parametrize("key", ["x", "0" * 15, "0" * 15 + "G", "ab" * 40])
def test_what_is_no_key_is_refused(key: str) -> None:
    bench = Bench()
    bench.turn(request(1, key))
    (end,) = bench.server.ends("a")
    assert end.error_code == "invalid_value"


def test_a_trial_runs_with_the_best_priority_of_those_that_wait_for_it() -> None:
    """Else a suspect of low priority would keep one of high priority waiting, behind all others."""
    bench = Bench((A,), (B,), (C,))
    bench.turn(
        request(1, A, priority=3, max_tokens=100),
        request(2, B, priority=10),
        request(3, C, priority=-10),
        *(request(number, f"{number:016x}", max_tokens=100) for number in (4, 5, 6, 7)),
    )
    bench.until(lambda: 3 in bench.begun())
    assert bench.begun() >= {1, 2, 3}
    levels = {s.key[1]: s.level for s in bench.engine._live.of("a").values()}
    assert (levels[1], levels[2], levels[3]) == (3, -10, -10)  # the first runs alone in any case
