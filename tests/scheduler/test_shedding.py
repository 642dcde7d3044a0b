"""A full queue: who is pushed out for whom, who is refused, and what is counted."""

from __future__ import annotations

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.errors import InvalidRequest, Overloaded
from jaxserve.scheduler.sequence import SequenceState
from jaxserve.types import FinishReason
from tests.scheduler.driver import Driver


def full(**config) -> Driver:
    """One sequence runs, and the queue of four is open."""
    defaults = {"max_rows": 1, "max_step_tokens": 16, "decode_steps": 1, "max_waiting": 4}
    driver = Driver(SchedulerConfig(**defaults | config))
    driver.submit(4, 30, tenant="runs", priority=-100)
    driver.turn()
    return driver


def test_a_better_one_pushes_out_the_last_of_the_worst():
    driver = full()
    low = [driver.submit(4, 4, priority=10)[0] for _ in range(2)]
    lower = [driver.submit(4, 4, priority=20)[0] for _ in range(2)]
    driver.submit(4, 4)
    assert [s.reason for s in (*low, *lower)] == [None, None, None, FinishReason.ERROR]
    driver.submit(4, 4)
    driver.submit(4, 4)
    assert [s.reason for s in low] == [None, FinishReason.ERROR]
    assert driver.scheduler.shedding.counts == {"priority": 3}
    with pytest.raises(Overloaded, match="4 sequences wait and 1 more came, the limit is 4"):
        driver.submit(4, 4, priority=20)
    assert driver.scheduler.shedding.counts == {"priority": 3, "queue_full": 1}
    driver.run()


def test_what_the_shed_are_told():
    driver = full(max_waiting=1)
    (low,) = driver.submit(4, 4, priority=10)
    driver.scheduler.submit([("client", 9)], [1], low.sampling)
    (shed,) = driver.scheduler.shedding.take()
    assert shed[0] is low and low.state is SequenceState.FINISHED
    assert "better priority took the place" in shed[1].message
    assert driver.scheduler.shedding.take() == []


def test_among_equals_the_tenant_with_most_waiting_gives_way():
    driver = full()
    many = [driver.submit(4, 4, tenant="many")[0] for _ in range(4)]
    driver.submit(4, 4, tenant="few")
    driver.submit(4, 4, tenant="few")
    assert [s.reason for s in many] == [None, None, FinishReason.ERROR, FinishReason.ERROR]
    with pytest.raises(Overloaded):  # two each: nobody has more than the newcomer's would have
        driver.submit(4, 4, tenant="few")
    assert driver.scheduler.shedding.counts == {"fair_share": 2, "queue_full": 1}
    driver.run()


def test_fcfs_sheds_by_priority_only():
    driver = full(fairness="fcfs")
    for _ in range(4):
        driver.submit(4, 4, tenant="many")
    with pytest.raises(Overloaded):
        driver.submit(4, 4, tenant="few")
    driver.submit(4, 4, tenant="few", priority=-1)
    driver.run()


def test_a_request_is_shed_with_all_its_choices():
    driver = full()
    choices = driver.submit(4, 4, priority=10, n=4)
    driver.submit(4, 4)
    assert all(choice.reason is FinishReason.ERROR for choice in choices)
    assert driver.scheduler.shedding.counts == {"priority": 4}
    assert driver.scheduler.num_waiting == 1
    driver.run()


def test_what_has_begun_is_never_shed():
    driver = full(max_waiting=2)
    driver.run()
    begun = driver.submit(4, 20, priority=10)[0]
    driver.turn()
    driver.submit(4, 20)
    driver.turn()  # the low one is preempted, and waits with a token
    assert begun.state is SequenceState.WAITING
    driver.submit(4, 4)
    with pytest.raises(Overloaded):
        driver.submit(4, 4)
    driver.run()
    assert begun.reason is FinishReason.LENGTH


def test_if_not_enough_can_go_nobody_goes():
    driver = full()
    low = [driver.submit(4, 4, priority=10)[0] for _ in range(2)]
    normal = [driver.submit(4, 4, tenant="few")[0] for _ in range(2)]
    before = driver.scheduler._accounts.account(10, "", 1.0).counter
    with pytest.raises(Overloaded):
        driver.submit(4, 4, n=4)
    assert all(s.reason is None for s in low + normal)
    assert driver.scheduler._accounts.account(10, "", 1.0).counter == before
    assert driver.scheduler.num_waiting == 4
    driver.run()
    firsts = [driver.first_token_at[s] for s in low]
    assert firsts == sorted(firsts)  # and they stand where they stood


def test_a_bound_of_tokens():
    driver = full(max_waiting=100, max_waiting_tokens=40)
    driver.submit(30, 4)
    with pytest.raises(Overloaded, match=r"30 tokens wait and 11 more came, the limit is 40"):
        driver.submit(11, 4)
    low = driver.submit(10, 4, priority=10)[0]
    driver.submit(5, 4)
    assert low.reason is FinishReason.ERROR
    assert driver.scheduler.shedding.counts == {"queue_tokens": 1, "priority": 1}
    driver.run()


def test_tokens_that_a_free_slot_takes_at_once_are_not_bounded():
    driver = Driver(SchedulerConfig(max_rows=1, max_step_tokens=16, max_waiting_tokens=10))
    driver.submit(50, 4)
    driver.run()


def test_more_choices_than_may_ever_wait():
    driver = full()
    with pytest.raises(InvalidRequest, match=r"6 sequences are more.* 1 \+ 4"):
        driver.submit(4, 4, n=6)
    driver.run()
