"""Priorities: who is preempted, how soon a better one runs, ageing, and that nothing is lost."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.errors import InvalidRequest, Overloaded
from jaxserve.scheduler.queue import AGED
from jaxserve.scheduler.sequence import Resumed, SequenceState
from jaxserve.types import SamplingParams
from tests.fakes.rig import Rig
from tests.scheduler.driver import Driver

LOW, HIGH = 10, -10


def calls_to_first_token(driver: Driver, prompt_len: int) -> int:
    """Device calls that a request of high priority sees complete before its first token."""
    (high,) = driver.submit(prompt_len, 5, priority=HIGH)
    begun = driver.num_calls
    for _ in range(200):
        if high in driver.first_token_at:
            return driver.num_calls - 1 - begun + len(driver._in_flight)
        driver.turn()
    raise AssertionError("it never ran")


@pytest.mark.parametrize("prompt_len", [1, 7, 40, 90])
@pytest.mark.parametrize("full_of", ["slots", "pages"])
@pytest.mark.parametrize("prefilling", [False, True])
def test_a_high_one_runs_within_two_calls_and_its_own_prefill(prompt_len, full_of, prefilling):
    budget = 20
    config = SchedulerConfig(max_rows=6, max_step_tokens=budget, decode_steps=1)
    driver = Driver(config, num_pages=1000 if full_of == "slots" else 40, page_size=4)
    low = 60 if prefilling else 8
    for _ in range(20):
        driver.submit(low, 60, priority=LOW)
    for _ in range(3 if prefilling else 25):
        driver.turn()
    pool = driver.scheduler.pages.pools[0]
    if full_of == "slots":
        assert driver.scheduler._rows.slots.num_free == 0 or prefilling
    else:
        assert pool.num_free < 10 or prefilling
    # Its own prefill: chunks beside at most five rows that decode.
    prefill = -(-prompt_len // (budget - config.max_rows + 1))
    assert calls_to_first_token(driver, prompt_len) <= 2 + prefill
    driver.run()
    assert sum(s.num_preemptions for s in driver.sequences if s.level == HIGH) == 0


def test_slots_are_taken_from_the_worst_and_the_last():
    rig = Rig(max_rows=3, pages=200, decode_steps=1)
    first = rig.submit([1] * 4, max_tokens=20, priority=LOW, ignore_eos=True)[0]
    last = rig.submit([2] * 4, max_tokens=20, priority=LOW, ignore_eos=True)[0]
    normal = rig.submit([3] * 4, max_tokens=20, ignore_eos=True)[0]
    waiting = rig.submit([4] * 4, max_tokens=20, priority=LOW, ignore_eos=True)[0]
    rig.turn()
    rig.turn()
    high = rig.submit([5] * 4, max_tokens=20, priority=HIGH, ignore_eos=True)[0]
    plans = len(rig.plans)
    rig.turn()
    assert last.state is SequenceState.WAITING and high.slot in {
        join.slot for join in rig.plans[plans].joins
    }
    rig.run()
    rig.check()
    assert [s.num_preemptions for s in (first, last, normal, high)] == [0, 1, 0, 0]
    assert last.first_token_ns < waiting.first_token_ns  # its place is the old one


def test_arrival_and_fairness_preempt_nobody_for_a_slot():
    rig = Rig(max_rows=2, pages=200, decode_steps=1)
    for _ in range(2):
        rig.submit([1] * 4, max_tokens=30, tenant="served much", ignore_eos=True)
    rig.turn()
    for number in range(6):
        rig.submit([2] * 4, max_tokens=5, tenant=f"other {number}", ignore_eos=True)
    rig.run()
    rig.check()
    assert rig.scheduler.num_preemptions == 0


def test_nobody_is_preempted_where_it_would_not_be_enough():
    rig = Rig(max_rows=4, pages=21, page_size=4, max_step_tokens=64, decode_steps=1)
    rig.submit([1] * 48, max_tokens=12, priority=HIGH, ignore_eos=True)
    low = rig.submit([2] * 8, max_tokens=4, priority=LOW, ignore_eos=True)[0]
    rig.turn()
    rig.submit([3] * 40, max_tokens=4, priority=HIGH, ignore_eos=True)
    rig.run()
    rig.check()
    assert low.num_preemptions == 0


def test_a_prefilling_low_one_leaves_its_budget_to_a_high_one():
    rig = Rig(max_rows=4, pages=200, max_step_tokens=8, decode_steps=1)
    rig.submit([1] * 100, max_tokens=4, priority=LOW, ignore_eos=True)
    rig.turn()
    high = rig.submit([2] * 8, max_tokens=4, priority=HIGH, ignore_eos=True)[0]
    rig.turn()
    assert [chunk.slot for chunk in rig.plans[-1].chunks] == [high.slot]
    rig.run()
    rig.check()


@pytest.mark.parametrize("longest_wait_s", [3, 20])
def test_ageing_bounds_starvation(longest_wait_s):
    """Beside endless better ones it waits the longest wait, and for those that aged before it."""
    config = SchedulerConfig(
        max_rows=2, max_step_tokens=16, decode_steps=1, longest_wait_s=longest_wait_s
    )
    driver = Driver(config, num_pages=60)
    for _ in range(3):
        driver.submit(4, 6, priority=HIGH)
    low = [driver.submit(4, 6, priority=LOW)[0] for _ in range(5)]
    first_run: dict = {}
    for turn in range(400):
        driver.now_ns = (1 + turn) * 10**9  # a call takes a second
        if len(driver.scheduler._waiting) < 20:
            driver.submit(4, 6, priority=HIGH)
        driver.turn()
        for sequence in low:
            if sequence.scheduled_ns:
                first_run.setdefault(sequence, turn)
    # Two at a time, behind the third of the first ones, each 8 calls from its prompt to its end.
    for place, sequence in enumerate(low):
        assert first_run[sequence] <= longest_wait_s + 2 + 8 * ((place + 1) // 2), place
    assert all(sequence.level == AGED for sequence in low)
    assert sum(sequence.num_preemptions for sequence in low) == 0  # boosted while they run


def test_without_ageing_a_low_one_waits_for_ever():
    driver = Driver(SchedulerConfig(max_rows=1, max_step_tokens=16, decode_steps=1), num_pages=60)
    driver.submit(4, 6, priority=HIGH)
    (low,) = driver.submit(4, 6, priority=LOW)
    for turn in range(400):
        driver.now_ns = (1 + turn) * 10**9
        if len(driver.scheduler._waiting) < 3:
            driver.submit(4, 6, priority=HIGH)
        driver.turn()
    assert low.scheduled_ns == 0


requests = st.tuples(
    st.integers(1, 30),
    st.integers(1, 24),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from([LOW, 0, HIGH]),
    st.sampled_from([1, 1, 3]),
)
scripts = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), requests),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
        st.tuples(st.just("turn"), st.integers(1, 6)),
        st.tuples(st.just("wait"), st.integers(1, 20)),
    ),
    min_size=3,
    max_size=30,
)
configs = st.builds(
    SchedulerConfig,
    max_rows=st.integers(1, 5),
    max_step_tokens=st.integers(5, 40),
    decode_steps=st.sampled_from([1, 3]),
    max_waiting=st.sampled_from([3, 100]),
    max_waiting_tokens=st.sampled_from([0, 60]),
    longest_wait_s=st.sampled_from([0.0, 10.0]),
    fairness=st.sampled_from(["vtc", "locality", "fcfs"]),
    locality_quantum_tokens=st.sampled_from([1, 100]),
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs, spare_pages=st.sampled_from([0, 3, 40]), script=scripts)
def test_no_sequence_is_lost_no_slot_leaked_and_pages_are_conserved(config, spare_pages, script):
    driver = Driver(config, num_pages=15 + spare_pages, stop_chance=0.03)
    for action, value in script:
        if action == "submit":
            prompt_len, max_tokens, tenant, priority, n = value
            with contextlib.suppress(Overloaded, InvalidRequest):
                driver.submit(prompt_len, max_tokens, tenant=tenant, priority=priority, n=n)
        elif action == "cancel" and driver.sequences:
            driver.cancel(driver.sequences[value % len(driver.sequences)])
        elif action == "wait":
            driver.now_ns += value * 10**9
        elif action == "turn":
            for _ in range(value):
                driver.turn()
                driver.check_accounts()
    driver.run()


def test_a_crash_does_not_begin_the_longest_wait_anew():
    config = SchedulerConfig(max_rows=1, max_step_tokens=16, longest_wait_s=10)
    driver = Driver(config)
    driver.submit(4, 50)
    driver.turn()
    resumed = Resumed(choices=[0], emitted=[[]], queued_ns=[8 * 10**9])
    sampling = SamplingParams(max_tokens=4, seed=0)
    (low,) = driver.scheduler.submit([("c", 9)], [1], sampling, priority=10, resumed=resumed)
    queue = driver.scheduler._waiting
    driver.now_ns += 10**9
    queue.refresh()
    assert low.level == 10
    driver.now_ns += 2 * 10**9
    queue.refresh()
    assert low.level == AGED
