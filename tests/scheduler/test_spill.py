"""Cached pages that the device gave up come back from the host; the fake device reads them all."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.host_pages import HostPages
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.spill import EARNED, EVICTIONS_A_PAGE, FIRST_CREDIT, RUN_PAGES, Spill
from tests.fakes.executor import FULL, sliding
from tests.fakes.rig import VOCAB, Rig

STEM = [1 + (i * i) % (VOCAB - 1) for i in range(40)]
STEADY = {"max_tokens": 6, "ignore_eos": True}


def other(number: int, length: int = 40) -> list[int]:
    """A prompt that begins like no other."""
    return [(number * 7 + i * (number + 3)) % (VOCAB - 1) + 1 for i in range(length)]


@pytest.mark.parametrize("groups", [(FULL,), (FULL, sliding(9))])
def test_what_was_evicted_is_loaded_instead_of_computed(groups):
    rig = Rig(groups, pages=14, host_pages=100, max_step_tokens=64)
    rig.submit([*STEM, 1], **STEADY)
    rig.run()
    for number in range(4):  # each needs 12 pages: nothing of the first is left
        rig.submit(other(number), **STEADY)
        rig.run()
    positions = rig.executor.num_positions
    (again,) = rig.submit([*STEM, 2, 3], **STEADY)
    rig.run()
    rig.check()
    assert again.num_cached == 40
    assert rig.executor.num_positions - positions == 2 + 5
    assert sum(len(plan.page_loads) for plan in rig.plans) >= 10


def test_without_room_on_the_host_it_is_computed_again():
    rig = Rig(pages=14, host_pages=0, max_step_tokens=64)
    for prompt in (STEM, other(1), other(2), STEM):
        (sequence,) = rig.submit(prompt, **STEADY)
        rig.run()
    rig.check()
    assert sequence.num_cached == 0
    assert all(not plan.page_saves for plan in rig.plans)


def test_sequences_that_are_set_back_take_the_place_of_what_is_kept():
    host = HostPages([3])
    assert [host.keep(0, name) for name in (b"a", b"b", b"c")] == [0, 1, 2]
    assert host.num_free(0) == 3 and host.num_used == 0 and host.num_kept == 3
    assert host.keep(0, b"a") is None  # it is there, and is now the latest used
    assert host.take(0, 2) == [1, 2]
    assert (host.find(0, b"a"), host.find(0, b"b")) == (0, None)
    assert host.num_free(0) == 1 and host.num_used == 2
    host.pin(0, host.use(0, b"a"))
    assert host.num_free(0) == 0 and host.keep(0, b"d") is None
    host.unpin()
    assert host.keep(0, b"d") == 0 and host.find(0, b"a") is None


def test_a_page_that_is_given_up_before_it_was_loaded_is_neither_loaded_nor_saved():
    pages = PageAllocator(4, [FULL], [3])
    host = HostPages([5])
    spill = Spill(pages, host)
    (pool,) = pages.pools
    host.keep(0, b"x")
    page = pool.take()
    pool.register(page, b"x")
    spill.load(0, spill.reserve(0, b"x"), page)
    pool.release(page)
    for _ in range(2):
        pool.take()  # the second one evicts it
    spill.tell(plan := Plan(step_id=0))
    assert plan.page_loads == plan.page_saves == []
    assert host.find(0, b"x") is not None


def test_what_nobody_asks_for_again_is_soon_saved_no_more():
    pages = PageAllocator(4, [FULL], [2])
    (pool,) = pages.pools
    spill = Spill(pages, HostPages([10_000]))
    number = 0

    def evict(count: int) -> int:
        """Fills and gives up so many pages; how many of them were saved."""
        nonlocal number
        for _ in range(count):
            page = pool.take()
            number += 1
            pool.register(page, number.to_bytes(4, "big"))
            pool.release(page)
        spill.tell(plan := Plan(step_id=0))
        return len(plan.page_saves)

    assert evict(257) == 256 == FIRST_CREDIT  # the last one is still there
    assert evict(EVICTIONS_A_PAGE * RUN_PAGES) == 0
    assert evict(EVICTIONS_A_PAGE * RUN_PAGES) == RUN_PAGES
    spill.load(0, spill.reserve(0, (5).to_bytes(4, "big")), page=1)
    spill._loads.clear()
    assert evict(1000) == RUN_PAGES - 1 + EARNED  # what had gathered since, and what it earned


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.sampled_from([(FULL,), (FULL, sliding(9)), (sliding(6),)]))
def test_tokens_always_equal_the_oracle(seed, groups):
    """Few pages on either side: everything is evicted, kept, set back, loaded and dropped."""
    draw = random.Random(seed)
    rig = Rig(
        groups,
        pages=draw.choice([14, 20, 30]),
        host_pages=draw.choice([2, 8, 30]),
        max_rows=3,
        max_step_tokens=draw.choice([8, 32]),
        decode_steps=draw.choice([1, 4]),
    )
    stems = [STEM, other(1), other(2)]
    for _ in range(25):
        if draw.random() < 0.6:
            stem = draw.choice(stems)[: draw.randrange(1, 41)]
            rig.submit(
                [*stem, draw.randrange(1, VOCAB)],
                n=draw.choice([1, 1, 2]),
                priority=draw.choice([0, 0, -1]),
                max_tokens=draw.randrange(1, 8),
                ignore_eos=True,
                repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            )
        elif rig.sequences and draw.random() < 0.2:
            rig.cancel(draw.choice(rig.sequences))
        for _ in range(draw.randrange(4)):
            rig.turn()
    rig.run()
    rig.check()


def test_host_pages_against_a_plain_model():
    draw = random.Random(5)
    host = HostPages([6])
    held: list[int] = []
    kept: OrderedDict[int, int] = OrderedDict()
    for _ in range(10_000):
        name = draw.randrange(12)
        digest = bytes([name])
        action = draw.randrange(4)
        if action == 0 and host.num_free(0):
            (page,) = host.take(0, 1)
            if len(held) + len(kept) == 6:
                _, oldest = kept.popitem(last=False)
                assert page == oldest
            held.append(page)
        elif action == 1 and held:
            page = held.pop(draw.randrange(len(held)))
            host._free[0].append(page)
        elif action == 2:
            page = host.keep(0, digest)
            if name in kept:
                assert page is None
                kept.move_to_end(name)
            elif page is not None:
                if len(held) + len(kept) == 6:
                    assert page == kept.popitem(last=False)[1]
                kept[name] = page
            else:
                assert len(held) == 6
        else:
            assert host.find(0, digest) == kept.get(name)
        assert host.num_used == len(held) and host.num_kept == len(kept)
