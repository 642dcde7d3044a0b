"""What those are told that a full queue refuses: times one after another, as it empties."""

from __future__ import annotations

import pytest

from jaxserve.engine.backlog import Backlog
from jaxserve.engine.comeback import SOONEST_S, SPAN_S, Comebacks
from jaxserve.errors import InvalidRequest, Overloaded


class Refusing:
    """A full queue, with a clock and a pace."""

    def __init__(self, rate: float) -> None:
        self.now_s, self.rate = 100.0, rate
        self.comebacks = Comebacks(lambda: self.rate, lambda: self.now_s)

    def refuse(self, num_sequences: int = 1) -> float:
        """What a request of so many is told."""
        error = Overloaded("full")
        self.comebacks.tell(error, num_sequences)
        assert error.retry_after_s is not None
        return error.retry_after_s


def test_a_herd_is_told_times_at_the_pace_of_the_queue():
    queue = Refusing(rate=4.0)
    assert [queue.refuse() for _ in range(4)] == [1.0, 1.25, 1.5, 1.75]
    assert queue.refuse(6) == 2.0
    assert queue.refuse() == 3.5
    queue.now_s += 2
    assert queue.refuse() == 1.75  # its time is later than all that were told
    queue.now_s += 50
    assert queue.refuse() == 1.0


def test_no_time_is_beyond_what_clients_keep_to_and_an_unknown_pace_is_one_a_second():
    queue = Refusing(rate=0.0)
    told = [queue.refuse() for _ in range(62)]
    assert told == [*range(1, 61), 2, 3]
    assert max(told) == SOONEST_S + SPAN_S == 60
    wide = [queue.refuse(16) for _ in range(8)]
    assert wide == [4, 20, 36, 52, 9, 25, 41, 57]  # 68 is 9: between those before


def test_other_refusals_are_left_alone():
    queue = Refusing(rate=1.0)
    wrong, known = InvalidRequest("no"), Overloaded("later", retry_after_s=9.0)
    for error in (wrong, known):
        queue.comebacks.tell(error, 1)
    assert (wrong.retry_after_s, known.retry_after_s) == (None, 9.0)
    assert queue.refuse() == 1.0


def test_the_pace_is_that_of_rows_that_become_free():
    backlog = Backlog()
    assert backlog.rate(8) == 0.0
    backlog._held.add(2_000_000_000, 1)
    assert backlog.rate(8) == pytest.approx(4.0)
