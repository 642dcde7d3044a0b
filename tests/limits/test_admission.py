"""The estimate of a wait, what it refuses, and what overload gives up, in which order."""

from __future__ import annotations

from collections import Counter

import pytest

from jaxserve.config import LimitsConfig
from jaxserve.errors import DeadlineExceeded, Overloaded
from jaxserve.limits.admission import MARGIN, Admission
from jaxserve.limits.degradation import Degradation
from jaxserve.limits.wait import Newcomer, run_s, wait_s
from jaxserve.protocol.status import ClassLoad, EngineStatus

S = 1_000_000_000


def status(*loads: ClassLoad, **values) -> EngineStatus:
    """An engine of 10 rows that serves a sequence in 2 s and 1000 prompt tokens a second."""
    fields = {
        "max_rows": 10,
        "service_s": 2.0,
        "token_s": 0.02,
        "output_share": 0.5,
        "prefill_tokens_per_s": 1000.0,
        "pages_total": 100,
    }
    return EngineStatus(state="ready", pid=1, step_age_s=0, loads=[*loads], **(fields | values))


def load(priority=0, running=0, waiting=0, tokens=0, tenant="a", weight=1.0) -> ClassLoad:
    """A class of sequences."""
    return ClassLoad(
        priority=priority,
        tenant=tenant,
        weight=weight,
        running=running,
        waiting=waiting,
        tokens=tokens,
    )


def wait(engine: EngineStatus, **newcomer) -> float:
    """The wait of somebody of normal priority, behind all."""
    return wait_s(engine, engine.loads, Newcomer(**({"priority": 0} | newcomer)))


def test_who_finds_a_free_row_waits_for_nobody():
    assert wait(status()) == 0
    assert wait(status(load(running=9))) == 0
    assert wait(status(load(running=10))) == pytest.approx(2 / 10)
    assert wait(status(load(running=10, waiting=49))) == pytest.approx(50 * 2 / 10)
    assert wait(status(load(running=5), pages_used=95)) == pytest.approx(2 / 5)  # no pages are
    assert wait(status(load(running=10, waiting=49), service_s=0.0)) == 0  # nothing is known


def test_prompts_that_are_before_it_count():
    assert wait(status(load(running=2, tokens=3000)), tokens=500) == pytest.approx(3.5)
    assert wait(status(load(running=10, waiting=9, tokens=500))) == pytest.approx(2)


def test_a_better_priority_does_not_wait_behind_worse_ones():
    engine = status(load(priority=10, running=10, waiting=500, tokens=90_000))
    assert wait(engine) == 0
    assert wait(engine, priority=10) == pytest.approx(100.2)
    engine = status(load(priority=0, running=10, waiting=20), load(priority=10, waiting=500))
    assert wait(engine, priority=-10) == 0
    assert wait(engine) == pytest.approx(21 * 2 / 10)


def test_a_tenants_own_queue_counts_and_of_others_only_their_share():
    engine = status(load(running=10), load(waiting=1000, tenant="heavy"))
    assert wait(engine, tenant="heavy") == pytest.approx(1001 * 0.2)
    assert wait(engine, tenant="light") == pytest.approx(2 * 0.2)  # they take turns
    assert wait(engine, tenant="light", weight=0.1) == pytest.approx(11 * 0.2)
    assert wait(engine) == pytest.approx(1001 * 0.2)
    engine = status(load(running=10), load(priority=-1, waiting=1000, tenant="heavy"))
    assert wait(engine, tenant="light") == pytest.approx(1001 * 0.2)  # those go first in any case


def test_how_long_it_would_run():
    assert run_s(status(), Newcomer(priority=0)) == 2
    assert run_s(status(), Newcomer(priority=0, output_tokens=10)) == pytest.approx(0.2)
    assert run_s(status(), Newcomer(priority=0, output_tokens=150)) == 2
    assert run_s(status(), Newcomer(priority=0, output_tokens=1000)) == pytest.approx(10)


class Gate:
    """An admission over a status that a test sets."""

    def __init__(self, engine: EngineStatus, workers: int = 1, **config) -> None:
        self.engine = engine
        self.now_ns = 100 * S
        self.asked = 0
        self.counts: Counter[str] = Counter()
        self.admission = Admission(
            LimitsConfig(**config),
            status=lambda: self.engine,
            refresh=self._refresh,
            count=lambda reason: self.counts.update([reason]),
            workers=workers,
            clock_ns=lambda: self.now_ns,
        )
        engine.at_ns = self.now_ns

    def _refresh(self) -> None:
        self.asked += 1

    def admit(self, priority=0, timeout_s=None, output_tokens=None, tenant="a", tokens=0):
        """A request."""
        newcomer = Newcomer(
            priority=priority, output_tokens=output_tokens, tenant=tenant, tokens=tokens
        )
        deadline_ns = None if timeout_s is None else self.now_ns + int(timeout_s * S)
        return self.admission.admit(newcomer, deadline_ns)


def test_what_cannot_be_done_in_time_is_refused_with_the_time():
    gate = Gate(status(load(running=10, waiting=49)))  # a wait of 10 s, then 2 s
    for timeout_s in (0.1, 11, 12 * MARGIN - 0.1):
        with pytest.raises(Overloaded, match="deadline") as caught:
            gate.admit(timeout_s=timeout_s)
        least_s = 12 * MARGIN - timeout_s
        retry_s = caught.value.retry_after_s or 0
        assert 0.5 <= retry_s <= 1.25 * max(least_s, 0.5) + 0.01
    assert gate.admit(timeout_s=12 * MARGIN + 0.1) is None
    assert gate.admit() is None
    assert gate.admit(timeout_s=0.2, priority=-1, output_tokens=5) is None
    with pytest.raises(DeadlineExceeded, match="passed"):
        gate.admit(timeout_s=0)
    assert gate.counts == {"deadline": 4}


def test_a_free_engine_refuses_no_deadline():
    gate = Gate(status(load(running=9), service_s=100.0))
    assert gate.admit(timeout_s=0.1) is None  # or it would never learn that it has become faster


def test_how_long_its_own_prompt_takes_is_no_wait():
    slow = status(load(running=9), service_s=100.0, prefill_tokens_per_s=10.0)
    gate = Gate(slow, max_wait_s=1.0)
    gate.admit(timeout_s=0.1, tokens=500)
    gate.engine = status(load(running=9, tokens=1), service_s=100.0, prefill_tokens_per_s=10.0)
    gate.engine.at_ns = gate.now_ns
    with pytest.raises(Overloaded, match="limit is 1 s"):  # behind another's it is
        gate.admit(tokens=500)
    assert gate.counts == {"max_wait": 1}


def test_a_glance_refuses_only_what_nothing_could_save():
    gate = Gate(status(load(running=10, waiting=49)), max_wait_s=5)
    worst, best = Newcomer(priority=0), Newcomer(priority=-5)
    with pytest.raises(Overloaded, match="limit is 5 s"):
        gate.admission.glance(worst, None)
    gate.admission.glance(best, None)
    assert gate.counts == {"max_wait": 1}
    Gate(status(load(running=10, waiting=49))).admission.glance(worst, None)  # nothing is asked


def test_what_was_submitted_since_the_status_counts_for_every_worker():
    gate = Gate(status(load(running=10)), workers=2, max_wait_s=5)
    newcomer = Newcomer(priority=0, tenant="a")
    for _ in range(13):  # 5 s are 25 sequences: half of them the other worker's
        assert gate.admit() is None
        gate.now_ns += 1000
        gate.admission.submitted(newcomer)
    with pytest.raises(Overloaded):
        gate.admit()
    gate.engine = status(load(running=10, waiting=25))
    gate.engine.at_ns = gate.now_ns
    with pytest.raises(Overloaded):
        gate.admit()
    gate.engine = status(load(running=10))
    gate.engine.at_ns = gate.now_ns
    assert gate.admit() is None


def test_what_has_ended_since_the_status_is_waited_for_by_nobody():
    """A client that sends short requests one after another is refused none on an idle engine."""
    gate = Gate(status(), workers=2, max_wait_s=5)
    newcomer = Newcomer(priority=0, tenant="a")
    for _ in range(100):
        assert gate.admit() is None
        gate.now_ns += 1000
        gate.admission.ended(gate.admission.submitted(newcomer))
    numbers = [gate.admission.submitted(newcomer) for _ in range(30)]
    with pytest.raises(Overloaded):
        gate.admit()
    gate.admission.ended(numbers[3])
    gate.admission.ended(numbers[3])  # twice is harmless
    for number in numbers:
        gate.admission.ended(number)
    assert gate.admit() is None


def test_a_fresh_status_is_asked_for_while_requests_come():
    gate = Gate(status(), max_wait_s=5)
    gate.admit()
    assert gate.asked == 0
    gate.now_ns += S // 5
    gate.admit()
    assert gate.asked == 1


def test_levels_go_up_while_it_lasts_and_down_with_hysteresis():
    degradation = Degradation(LimitsConfig(overload_wait_s=4, overload_after_s=10))
    seen = []
    waits = [5] * 45 + [3] * 30 + [1] * 25 + [5] * 5 + [1] * 45
    for second, seconds_waited in enumerate(waits):
        degradation.observe(seconds_waited, second)
        seen.append(degradation.level)
    assert seen[:45:10] == [0, 1, 2, 3, 3]
    assert seen[45:75] == [3] * 30  # between half of it and it, nothing changes
    assert seen[99] == 1
    assert seen[100:105] == [1] * 5  # a moment is not overload
    assert seen[-1] == 0


def test_a_time_without_requests_counts_as_calm():
    degradation = Degradation(LimitsConfig(overload_wait_s=4, overload_after_s=10))
    for second in range(25):
        degradation.observe(5, second)
    assert degradation.level == 2
    degradation.observe(0, 36)
    assert degradation.level == 1
    degradation.observe(0, 1000)
    assert degradation.level == 0


def test_overload_sheds_low_first_then_normal_and_never_high():
    busy = status(load(running=10, waiting=49))
    gate = Gate(busy, overload_wait_s=4, overload_after_s=10, low_priority_max_tokens=8)
    outcomes = []
    for _ in range(5):
        told = []
        for priority in (10, 0, -10):
            try:
                told.append(gate.admit(priority=priority, output_tokens=50))
            except Overloaded as error:
                told.append("refused" if "overloaded" in error.message else error.message)
        outcomes.append(told)
        gate.now_ns += 10 * S
    assert outcomes == [
        [None, None, None],
        [8, None, None],
        ["refused", None, None],
        ["refused", "refused", None],
        ["refused", "refused", None],
    ]
    assert gate.counts == {"capped": 1, "low_priority": 3, "normal_priority": 2}
    assert gate.admit(priority=-10, output_tokens=5) is None
    gate.engine = status(load(running=10, waiting=4))  # 1 s
    assert gate.admit() is None  # at level 3 still, but the queue is short: nobody idles
    with pytest.raises(Overloaded, match="low"):
        gate.admit(priority=1)


def test_overload_passes_though_nobody_comes():
    gate = Gate(status(load(running=10, waiting=49)), overload_wait_s=4, overload_after_s=10)
    for _ in range(25):
        gate.admission.look()
        gate.now_ns += S
    assert gate.admission.level == 2 and gate.admission.normal_wait_s == pytest.approx(10)
    gate.engine = status()
    for _ in range(25):
        gate.admission.look()
        gate.now_ns += S
    assert gate.admission.level == 0 and gate.admission.normal_wait_s == 0
    assert gate.counts == {}


def test_a_cap_spares_who_asks_for_less():
    gate = Gate(status(load(running=10, waiting=49)), overload_wait_s=4, overload_after_s=10)
    gate.admit()
    gate.now_ns += 10 * S
    assert gate.admit(priority=1, output_tokens=128) is None
    assert gate.admit(priority=1, output_tokens=129) == 128
    assert gate.admit(priority=1) == 128
    assert gate.counts == {"capped": 2}


def test_texts_wait_in_a_queue_of_their_own():
    crowded = status(load(running=10, waiting=500), embed_wait_s=3.0)
    gate = Gate(crowded, max_wait_s=4.0, overload_wait_s=5.0, overload_after_s=1.0)
    gate.admission.admit_texts(0, None)  # the wait for a row is nothing to them
    gate.admission.admit_texts(0, gate.now_ns + 4 * S)
    with pytest.raises(Overloaded, match="would wait about 3.0 s, and its deadline is 3.0 s"):
        gate.admission.admit_texts(0, gate.now_ns + 3 * S)
    with pytest.raises(DeadlineExceeded):
        gate.admission.admit_texts(0, gate.now_ns)
    crowded.embed_wait_s = 4.5
    with pytest.raises(Overloaded, match="the limit is 4 s"):
        gate.admission.admit_texts(0, None)
    crowded.embed_wait_s = 0.0
    for _ in range(3):  # generation is overloaded: low priority is given up, of either kind
        with pytest.raises(Overloaded):
            gate.admit()
        gate.now_ns += 1 * S
    with pytest.raises(Overloaded, match="takes no requests of low priority"):
        gate.admission.admit_texts(10, None)
    gate.admission.admit_texts(-10, None)
    assert gate.counts["max_wait"] >= 1 and gate.counts["low_priority"] == 1
    calm = Gate(status(embed_wait_s=100.0))
    calm.admission.admit_texts(10, None)  # nothing is limited
    assert calm.asked == 0
