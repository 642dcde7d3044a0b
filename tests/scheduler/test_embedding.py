"""The queue of texts: order, fairness, bounds, and an account of every text, whatever happens."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.errors import InvalidRequest, Overloaded
from jaxserve.scheduler.embedding import EmbeddingQueue, Text, group_size
from jaxserve.types import EmbeddingParams, FinishReason

PARAMS = EmbeddingParams(pooling="mean", normalize=True)


def submit(queue: EmbeddingQueue, lengths: list[int], first: int = 0, **values) -> list[Text]:
    keys = [("client", first + i) for i in range(len(lengths))]
    texts = [[1] * length for length in lengths]
    return queue.submit(keys, texts, [2**31 - 1] * len(texts), PARAMS, **values)


def step(queue: EmbeddingQueue, budget: int) -> list[Text]:
    room = [budget]

    def add(length: int) -> bool:
        room[0] -= length
        return room[0] >= 0 or room[0] == budget - length

    return queue.take(add)


def test_order_is_by_priority_then_arrival():
    queue = EmbeddingQueue(SchedulerConfig(max_waiting=10))
    late = submit(queue, [4, 4, 4], priority=1)
    early = submit(queue, [4, 4], 10)
    assert step(queue, 12) == [*early, late[0]]
    assert queue.num_waiting == 2 and queue.num_tokens == 8
    assert step(queue, 3) == [late[1]]  # longer than the budget: a step by itself


def test_tenants_share_by_weight():
    queue = EmbeddingQueue(SchedulerConfig(max_waiting=1000))
    submit(queue, [10] * 90, tenant="a")
    submit(queue, [10] * 90, 100, tenant="b", weight=2.0)
    served = Counter(text.account.tenant for _ in range(30) for text in step(queue, 20))
    assert served["a"] + served["b"] == 60
    assert served["b"] == pytest.approx(2 * served["a"], abs=2)


def test_what_waits_too_long_comes_first():
    now = [0]
    config = SchedulerConfig(max_waiting=10, longest_wait_s=1.0)
    queue = EmbeddingQueue(config, clock_ns=lambda: now[0])
    (low,) = submit(queue, [4], priority=10)
    now[0] = 2 * 10**9
    (high,) = submit(queue, [4], 1, priority=-10)
    assert step(queue, 4) == [low] and step(queue, 4) == [high]
    assert low.queued_ns == 0 and low.scheduled_ns == now[0]


def test_a_text_that_comes_again_is_let_in_and_not_charged_twice():
    queue = EmbeddingQueue(SchedulerConfig(max_rows=1, max_waiting=2))
    submit(queue, [4] * 3)
    with pytest.raises(Overloaded):
        submit(queue, [4], 10)
    (again,) = submit(queue, [4], 11, again=True, tenant="b")
    assert queue.num_waiting == 4
    while step(queue, 4):
        pass
    assert again.account.counter == 0
    with pytest.raises(InvalidRequest, match="4 sequences are more than may ever"):
        submit(queue, [4] * 4, 20)


def test_groups_leave_room_for_others():
    assert group_size(SchedulerConfig()) == 256
    assert group_size(SchedulerConfig(max_waiting=200, max_rows=8)) == 52
    assert group_size(SchedulerConfig(max_waiting=0, max_rows=1)) == 1


@settings(max_examples=60)
@given(st.data())
def test_every_text_ends_once(data):
    queue = EmbeddingQueue(SchedulerConfig(max_rows=2, max_waiting=12))
    known: list[Text] = []
    launched: list[list[Text]] = []
    ends: Counter[Text] = Counter()
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["submit", "step", "read", "cancel"])):
            case "submit":
                lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
                values = {
                    "priority": data.draw(st.integers(-1, 1)),
                    "tenant": data.draw(st.sampled_from("abc")),
                }
                with suppress(Overloaded):
                    known += submit(queue, lengths, len(known), **values)
                for text, _ in queue.take_shed():
                    ends[text] += 1
            case "step":
                launched.append(step(queue, 16))
                assert sum(text.prompt_len for text in launched[-1]) <= 16
            case "read" if launched:
                for text in launched.pop(0):
                    ends[text] += queue.done(text)
            case "cancel" if known:
                text = data.draw(st.sampled_from(known))
                if text.reason is None:
                    queue.cancel(text, FinishReason.CANCELLED)
                    ends[text] += 1
        assert queue.num_waiting <= 12 + 2
    while queue.num_waiting:
        launched.append(step(queue, 16))
    for texts in launched:
        for text in texts:
            ends[text] += queue.done(text)
    assert ends == Counter(known)
    assert queue.num_tokens == 0


def test_a_crash_does_not_begin_the_longest_wait_anew():
    now = [10**9]
    config = SchedulerConfig(max_waiting=10, longest_wait_s=1.0)
    queue = EmbeddingQueue(config, clock_ns=lambda: now[0])
    submit(queue, [4], priority=10, again=True)
    (old,) = submit(queue, [4], 1, priority=10, again=True, queued_ns=9 * 10**8)
    now[0] += 2 * 10**8
    (high,) = submit(queue, [4], 2, priority=-10)
    assert step(queue, 4) == [old] and step(queue, 4) == [high]
