"""The waiting queue against a sorted list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.pages import PageTable
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import SamplingParams


def sequence(priority: int, arrival: int) -> Sequence:
    """A sequence of a rank."""
    return Sequence(
        key=("client", arrival),
        token_ids=[1],
        prompt_len=1,
        sampling=SamplingParams(max_tokens=1, seed=0),
        choice=0,
        rank=(priority, arrival),
        stop_token_ids=frozenset(),
        table=PageTable([], []),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove", "again"]), st.integers(0, 99))))
def test_order_is_by_priority_then_arrival(script):
    queue = WaitingQueue()
    model: list[Sequence] = []
    popped: list[Sequence] = []
    for arrival, (action, value) in enumerate(script):
        if action == "push":
            model.append(sequence(value % 3, arrival))
            queue.push(model[-1])
        elif action == "again" and popped:  # preempted: back at its old place
            model.append(popped.pop())
            queue.push(model[-1])
        elif action == "pop" and model:
            best = min(model, key=lambda s: s.rank)
            assert queue.peek() is best
            assert queue.pop() is best
            model.remove(best)
            popped.append(best)
        elif action == "remove" and model:
            queue.remove(model.pop(value % len(model)))
        assert len(queue) == len(model)
        assert all(s in queue for s in model)
    assert [queue.pop() for _ in range(len(model))] == sorted(model, key=lambda s: s.rank)
    assert queue.peek() is None


def test_removed_entries_do_not_pile_up():
    queue = WaitingQueue()
    keep = sequence(0, 10**6)
    queue.push(keep)
    for arrival in range(5000):
        gone = sequence(0, arrival)
        queue.push(gone)
        queue.remove(gone)
    assert len(queue._heap) < 200
    assert queue.pop() is keep


def test_a_sequence_removed_and_pushed_again_comes_once():
    queue = WaitingQueue()
    one = sequence(0, 1)
    queue.push(one)
    queue.remove(one)
    queue.push(one)
    assert queue.pop() is one
    assert queue.peek() is None and len(queue) == 0
