"""Adapters in slots: who gets which, who waits, and that nobody gets another's tokens."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.sequence import AdapterUse, SequenceState
from tests.fakes.batch import ComparedBatch, DoublingShapes
from tests.fakes.rig import Rig


def use(number: int, rank_class: int = 0) -> AdapterUse:
    """One of many."""
    return AdapterUse(key=f"{number:06x}" + "0" * 26, rank_class=rank_class)


def rig(*slots: int, **settings: object) -> Rig:
    """With so many slots of each class."""
    options = {"adapter_slots": slots, "pages": 80} | settings
    made = Rig(**options)
    made.batch = ComparedBatch(DoublingShapes(), made.max_rows)
    return made


def loads(made: Rig) -> list[tuple[int, str]]:
    """Writes of slots, in order."""
    return [(load.slot, load.key) for plan in made.plans for load in plan.adapter_loads]


def test_a_slot_is_written_once_and_shared() -> None:
    """Sequences of one adapter, at once and one after the other."""
    made = rig(2, 2)
    for _ in range(2):
        for _ in range(3):
            made.submit([1, 2, 3], adapter=use(7))
        made.submit([1, 2, 3])
        made.submit([1, 2, 3], adapter=use(8, 1))
        made.run()
    made.check()
    assert loads(made) == [(0, use(7).key), (2, use(8).key)]
    table = made.scheduler.adapters
    assert (table.num_joins, table.num_hits, table.num_held) == (8, 6, 2)


def test_the_least_recently_used_gives_way() -> None:
    """Not the one that came first."""
    made = rig(2)
    for number in (1, 2, 1, 3, 1, 2):
        made.submit([1, 2, 3], adapter=use(number))
        made.run()
    made.check()
    assert [int(key[:6], 16) for _, key in loads(made)] == [1, 2, 3, 2]


def test_nobody_waits_for_anothers_adapter() -> None:
    """All slots taken: the base, and those whose adapter is there, pass by who has to wait."""
    made = rig(1, max_rows=4)
    (first,) = made.submit([1, 2, 3], adapter=use(1), max_tokens=40, ignore_eos=True)
    made.turn()
    (parked,) = made.submit([1, 2, 3], adapter=use(2))
    (base,) = made.submit([1, 2, 3], max_tokens=4, ignore_eos=True)
    made.turn()
    assert parked.state is SequenceState.PARKED
    assert base.state in (SequenceState.PREFILLING, SequenceState.DECODING)
    assert made.scheduler.num_waiting == 1
    made.run()
    made.check()
    assert made.emitted[first] and made.emitted[parked] == made.expected(parked)


def test_who_waits_is_not_overtaken_for_ever() -> None:
    """New requests for a popular adapter do not join it while another waits for its slot."""
    made = rig(1, max_rows=3)
    long = {"max_tokens": 12, "ignore_eos": True}
    made.submit([1, 2, 3], adapter=use(1), **long)
    made.turn()
    (parked,) = made.submit([1, 2, 3], adapter=use(2), **long)
    for _ in range(200):
        made.turn()
        made.submit([4, 5], adapter=use(1), **long)
        if parked.reason is not None:
            break
    assert parked.reason is not None
    assert len(made.plans) < 40
    made.run()
    made.check()


@pytest.mark.parametrize("when", [0, 1, 5])
def test_cancel_while_parked(when: int) -> None:
    """Leaves nothing behind, and those that wait for the same adapter go on."""
    made = rig(1)
    made.submit([1, 2, 3], adapter=use(1), max_tokens=20, ignore_eos=True)
    made.turn()
    one, two = made.submit([1, 2, 3], n=2, adapter=use(2))
    for _ in range(when):
        made.turn()
    made.cancel(one)
    made.run()
    made.check()
    assert made.emitted[two] == made.expected(two)
    assert made.scheduler.adapters.num_parked == 0


def test_pages_are_not_shared_between_adapters() -> None:
    """The same prompt under another adapter, and under none, finds nothing."""
    made = rig(4)
    prompt = list(range(1, 18))
    for number in (None, 1, 2):
        made.submit(prompt, adapter=None if number is None else use(number))
        made.run()
        assert made.scheduler.prefix.num_hit_tokens == 0
    made.submit(prompt, adapter=use(1))
    made.run()
    assert made.scheduler.prefix.num_hit_tokens == 16
    made.check()


@settings(max_examples=100)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(1,), (2, 1), (3, 2, 1)]),
    st.booleans(),
    st.sampled_from([0, 3]),
)
def test_random_traffic(seed: int, slots: tuple[int, ...], pipelined: bool, drafts: int) -> None:
    """Many adapters over few slots and few pages, with choices, priorities, cancels, preemption."""
    rng = random.Random(seed)
    made = rig(
        *slots,
        pages=rng.choice([24, 40]),
        host_pages=rng.choice([0, 30]),
        pipelined=pipelined,
        draft_tokens=drafts,
    )
    for _ in range(30):
        adapter = None
        if rng.random() < 0.8:
            rank_class = rng.randrange(len(slots))
            adapter = use(10 * rank_class + rng.randrange(5), rank_class)
        made.submit(
            [rng.randrange(50) for _ in range(rng.choice([1, 5, 12]))],
            n=rng.choice([1, 1, 3]),
            priority=rng.randrange(3),
            tenant=rng.choice("ab"),
            adapter=adapter,
            max_tokens=rng.choice([1, 4, 20]),
            seed=rng.randrange(4),
        )
        for _ in range(rng.randrange(4)):
            made.turn()
        if rng.random() < 0.2:
            made.cancel(rng.choice(made.sequences))
    made.run()
    made.check()
    made.batch.check()
    table = made.scheduler.adapters
    assert table.num_parked == 0
    assert table.num_joins - table.num_hits == len(loads(made))
    for plan in made.plans:  # a slot is written once in a plan
        written = Counter(load.slot for load in plan.adapter_loads)
        assert all(count == 1 for count in written.values())
