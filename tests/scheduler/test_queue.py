"""The waiting queue against a sorted list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.accounts import Accounts, Meter
from jaxserve.scheduler.pages import PageTable
from jaxserve.scheduler.queue import (
    AGED,
    MAX_PASSED,
    NUM_FOLLOWING,
    NUM_FRONT_SEEN,
    WaitingQueue,
)
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import SamplingParams


class World:
    """A queue with accounts, and a clock that the test moves."""

    def __init__(self, **config) -> None:
        self.config = SchedulerConfig(**config)
        self.now_s = 100.0
        self.cached: dict[Sequence, int] = {}
        self.accounts = Accounts(self.config)
        self.meter = Meter(self.accounts, 1000)
        self.queue = WaitingQueue(
            self.config,
            self.accounts,
            self.meter,
            cached_tokens=lambda sequence: self.cached.get(sequence, 0),
            clock_ns=lambda: round(self.now_s * 1e9),
        )
        self.num_arrived = 0

    def sequence(self, level: int = 0, tenant: str = "", prompt_len: int = 1) -> Sequence:
        """The next to arrive; not yet in the queue."""
        self.num_arrived += 1
        return Sequence(
            key=("client", self.num_arrived),
            token_ids=[1] * prompt_len,
            prompt_len=prompt_len,
            sampling=SamplingParams(max_tokens=1, seed=0),
            choice=0,
            level=level,
            arrival=self.num_arrived,
            stop_token_ids=frozenset(),
            table=PageTable([], []),
            account=self.accounts.account(level, tenant, 1.0),
            queued_ns=round(self.now_s * 1e9),
        )

    def push(self, level: int = 0, tenant: str = "", prompt_len: int = 1) -> Sequence:
        """The next to arrive, in the queue."""
        sequence = self.sequence(level, tenant, prompt_len)
        self.queue.push(sequence)
        return sequence

    def serve(self) -> Sequence:
        """The next is let in and ends at once; its prompt is charged."""
        sequence = self.queue.pop()
        self.meter.admit(sequence)
        self.meter.leave(sequence)
        return sequence


def key(sequence: Sequence) -> tuple[int, float, int]:
    """Where it should stand among sequences of tenants with different counters."""
    assert sequence.account is not None
    return sequence.level, sequence.account.counter, sequence.arrival


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "pop", "remove", "again"]), st.integers(0, 99)),
        max_size=60,
    )
)
def test_order_is_by_level_then_counter_then_arrival(script):
    world = World()
    queue = world.queue
    model: list[Sequence] = []
    popped: list[Sequence] = []
    for action, value in script:
        if action == "push":
            model.append(world.push(value % 3, f"tenant {value % 4}", 1 + value % 7))
        elif action == "again" and popped:  # preempted: back at its old place
            sequence = popped.pop()
            sequence.has_begun = True
            model.append(sequence)
            queue.push(sequence)
        elif action == "pop" and model:
            best = queue.peek()
            assert best is not None
            # Tenants may have equal counters; within one the first to arrive is next.
            assert key(best)[:2] == min(key(s)[:2] for s in model)
            mine = [s for s in model if s.account is best.account and s.level == best.level]
            assert best is min(mine, key=lambda s: s.arrival)
            popped.append(world.serve())
            assert popped[-1] is best
            model.remove(best)
        elif action == "remove" and model:
            queue.remove(model.pop(value % len(model)))
        assert len(queue) == len(model)
        assert all(s in queue for s in model)
        assert queue.num_tokens == sum(len(s.token_ids) for s in model)
        assert queue.best_level == min((s.level for s in model), default=None)
    while model:
        model.remove(world.serve())
    assert queue.peek() is None and queue.num_tokens == 0


def test_removed_entries_do_not_pile_up():
    world = World()
    keep = world.push()
    for _ in range(5000):
        world.queue.remove(world.push())
        world.queue.remove(world.push(0, "another"))
        world.queue.remove(world.push(7))
    rank = world.queue._ranks[0]
    assert len(rank.lines[keep.account]._fresh) < 200
    assert len(rank.heap) < 200 and len(world.queue._ranks) == 1
    assert world.queue.pop() is keep


def test_tenants_that_are_gone_are_forgotten():
    world = World()
    for number in range(20_000):
        world.push(0, f"tenant {number}")
        world.serve()
    assert len(world.accounts._levels[0].tenants) < 5000


def test_a_sequence_removed_and_pushed_again_comes_once():
    world = World()
    one = world.push()
    world.queue.remove(one)
    world.queue.push(one)
    assert world.queue.pop() is one
    assert world.queue.peek() is None and len(world.queue) == 0


def test_the_tenant_served_least_is_next():
    world = World()
    for _ in range(4):
        world.push(0, "long prompts", 30)
    for _ in range(12):
        world.push(0, "short prompts", 10)
    served = [world.serve().prompt_len for _ in range(16)]
    assert served == [30, 10, 10, 10] * 4


def test_weights_divide_the_service():
    world = World()
    for _ in range(30):
        world.push(0, "one")
        sequence = world.sequence(0, "three")
        sequence.account = world.accounts.account(0, "three", 3.0)
        world.queue.push(sequence)
    tenants = [sequence.account.tenant for _ in range(24) if (sequence := world.serve())]
    assert tenants.count("three") == 18


def test_first_come_first_served_knows_no_tenants():
    world = World(fairness="fcfs")
    sequences = [world.push(0, f"tenant {number % 3}", 1 + number) for number in range(9)]
    assert [world.serve() for _ in range(9)] == sequences


def test_nobody_saves_up_credit():
    world = World()
    for _ in range(10):
        world.push(0, "busy", 10)
    for _ in range(5):
        world.serve()
    world.push(0, "back", 10)
    world.push(0, "back", 10)
    world.push(0, "back", 10)
    # Lifted to the busy one's 50, not served five times in a row.
    assert world.accounts.account(0, "back", 1.0).counter == 50
    assert [world.serve().account.tenant for _ in range(4)] == ["busy", "back", "busy", "back"]


def test_the_last_to_leave_lifts_whoever_comes_to_an_empty_queue():
    world = World()
    world.push(0, "gone", 70)
    world.serve()
    world.push(0, "new", 5)
    assert world.accounts.account(0, "new", 1.0).counter == 70


def test_who_has_waited_too_long_goes_before_every_priority():
    world = World(longest_wait_s=10)
    low = world.push(5)
    world.now_s += 9.9
    high = world.push(-5)
    world.queue.refresh()
    assert world.queue.peek() is high
    world.now_s += 0.2
    world.queue.refresh()
    assert world.queue.peek() is low and low.level == AGED
    assert world.queue.pop() is low
    world.queue.push(low)  # preempted: it is still one that has waited too long
    assert world.queue.pop() is low
    assert world.queue.pop() is high


def test_only_time_in_the_queue_counts_as_waiting():
    world = World(longest_wait_s=10)
    sequence = world.push(5)
    world.now_s += 6
    assert world.queue.pop() is sequence
    sequence.scheduled_ns = 1
    world.now_s += 100  # it runs
    world.queue.push(sequence)
    world.now_s += 3.9
    world.queue.refresh()
    assert sequence.level == 5
    world.now_s += 0.2
    world.queue.refresh()
    assert sequence.level == AGED


def test_many_that_age_at_once_are_spread_over_plans():
    world = World(longest_wait_s=1)
    sequences = [world.push(1) for _ in range(600)]
    world.now_s += 5
    aged = []
    for _ in range(3):
        world.queue.refresh()
        aged.append(sum(sequence.level == AGED for sequence in sequences))
    assert aged == [256, 512, 600]


@pytest.mark.parametrize("was_preempted", [False, True])
def test_who_is_parked_goes_on_waiting(was_preempted):
    world = World(longest_wait_s=10)
    sequence = world.push(level=5)
    if was_preempted:
        assert world.queue.pop() is sequence
        sequence.scheduled_ns = 1
        world.now_s += 100  # it runs
        world.queue.push(sequence)
    world.now_s += 6
    world.queue.remove(sequence)  # no slot for its adapter
    world.now_s += 3
    world.queue.push(sequence)
    world.queue.refresh()
    assert sequence.level == 5
    world.now_s += 1.5
    world.queue.refresh()
    assert sequence.level == AGED


def test_locality_prefers_cached_prompts_within_the_quantum():
    world = World(fairness="locality", locality_quantum_tokens=50)
    plain = [world.push(0, "plain", 10) for _ in range(10)]
    cached = [world.push(0, "cached", 10) for _ in range(10)]
    world.cached |= dict.fromkeys(cached, 8)
    tenants = [world.serve().account.tenant for _ in range(20)]
    # Five times 10 use the quantum up; then the other's turn, to the same mark; and again.
    assert tenants == ["cached"] * 5 + ["plain"] * 5 + ["cached"] * 5 + ["plain"] * 5
    assert plain


def test_locality_looks_each_front_up_once_in_a_plan():
    world = World(fairness="locality", locality_quantum_tokens=10**6)
    looked: list[Sequence] = []
    world.queue._cached_tokens = lambda s: (looked.append(s), world.cached.get(s, 0))[1]
    waiting = [world.push(0, f"tenant {n % 3}") for n in range(30)]
    world.queue.refresh()
    first = world.serve()
    assert first is waiting[0] and len(looked) == len(set(looked)) == 24
    world.serve()  # of the others it is known
    assert len(looked) == len(set(looked)) == 25
    world.cached[waiting[29]] = world.cached[waiting[5]] = 16
    assert world.queue.peek() not in (waiting[5], waiting[29])  # found by the next plan
    world.queue.refresh()
    assert world.queue.peek() is waiting[5]


def test_locality_looks_ahead_for_the_next_plan():
    world = World(fairness="locality", locality_quantum_tokens=10**6)
    looked: list[Sequence] = []
    world.queue._cached_tokens = lambda s: (looked.append(s), world.cached.get(s, 0))[1]
    waiting = [world.push(0, f"tenant {n % 3}") for n in range(12)]
    world.cached[waiting[4]] = 16
    world.queue.look_ahead()
    assert len(looked) == 12
    world.queue.refresh()
    assert world.serve() is waiting[4] and len(looked) == 12  # the plan need not look
    newcomer = world.sequence(0, "another")
    world.cached[newcomer] = 32
    world.queue.look_ahead()
    world.queue.push(newcomer)
    world.queue.refresh()
    assert world.serve() is newcomer  # who came since is seen
    world.cached[waiting[7]] = 16
    world.queue.refresh()  # a plan that nobody has looked ahead for
    assert world.serve() is waiting[7]


def test_locality_looks_ahead_for_those_that_come_near_the_front_in_the_plan():
    world = World(fairness="locality", locality_quantum_tokens=10**6)
    looked: list[Sequence] = []
    world.queue._cached_tokens = lambda s: (looked.append(s), world.cached.get(s, 0))[1]
    waiting = [world.push(0, "tenant") for _ in range(20)]
    world.cached[waiting[8]] = 16
    world.queue.look_ahead()
    assert looked == waiting[: NUM_FRONT_SEEN + NUM_FOLLOWING]
    world.queue.refresh()
    assert world.serve() is waiting[0]  # the ninth is not near the front yet
    assert world.serve() is waiting[8]
    assert [world.serve() for _ in range(2)] == waiting[1:3]
    assert len(looked) == NUM_FRONT_SEEN + NUM_FOLLOWING
    assert [world.serve() for _ in range(2)] == waiting[3:5]
    assert looked[NUM_FRONT_SEEN + NUM_FOLLOWING :] == [waiting[12]]


def test_locality_sees_a_tenant_that_begins_to_wait_in_a_plan():
    world = World(fairness="locality", locality_quantum_tokens=10**6)
    for n in range(6):
        world.push(0, f"tenant {n % 2}")
    world.queue.refresh()
    world.serve()
    newcomer = world.sequence(0, "another")
    world.cached[newcomer] = 16
    world.queue.push(newcomer)
    assert world.serve() is newcomer


def test_locality_passes_nobody_over_for_ever():
    world = World(fairness="locality", locality_quantum_tokens=10**9)
    first = world.push()
    for _ in range(3 * MAX_PASSED):
        world.cached[world.push()] = 1
    order = [world.serve() for _ in range(3 * MAX_PASSED + 1)]
    assert order.index(first) == MAX_PASSED


@pytest.mark.parametrize("fairness", ["vtc", "locality", "fcfs"])
def test_the_best_is_the_same_until_something_changes(fairness):
    world = World(fairness=fairness)
    for number in range(20):
        world.push(number % 2, f"tenant {number % 3}", 5)
    for _ in range(20):
        assert world.queue.peek() is world.serve()
