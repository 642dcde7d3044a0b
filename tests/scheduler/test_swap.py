"""Sequences that are set back with their pages saved: tokens equal the oracle, nothing leaks."""

from __future__ import annotations

import random

import pytest

from jaxserve.scheduler.host_pages import HostPages, HostTable
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.plan import Chunk, Plan
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.swap import Swap
from jaxserve.scheduler.swap_costs import SwapCosts
from jaxserve.types import SamplingParams
from tests.fakes.executor import FULL, sliding
from tests.fakes.rig import VOCAB, Rig


def crowded(**world) -> Rig:
    """Two rows whose tokens do not fit the pages together."""
    few = {"pages": 11, "max_rows": 2, "decode_steps": 1, "host_pages": 20, "prefix": False}
    rig = Rig(**few | world)
    for token in (7, 8):
        rig.submit([token] * 4, max_tokens=24, ignore_eos=True)
    return rig


def until_swapped(rig: Rig) -> Sequence:
    """Turns until a sequence waits with its pages on the host."""
    while rig.scheduler.has_work:
        rig.turn()
        for sequence in rig.sequences:
            if sequence.host_table is not None:
                return sequence
    raise AssertionError("nothing was set back")


def test_a_victim_goes_on_where_it_was() -> None:
    rig = crowded()
    rig.run()
    rig.check()
    old, young = rig.sequences
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert young.num_recomputed == 0 and young.num_swapped > 4
    (loading,) = (plan for plan in rig.plans if plan.page_loads)
    (saving,) = (plan for plan in rig.plans if plan.page_saves)
    pages = -(-young.num_swapped // rig.page_size)
    assert len(saving.page_saves) == len(loading.page_loads) == pages
    assert [len(chunk.token_ids) for chunk in loading.chunks] == [1]
    assert loading.chunks[0].start == young.num_swapped
    assert rig.scheduler.swap.num_saved == rig.scheduler.swap.num_loaded == pages


def test_its_pages_are_free_in_the_plan_that_saves_them() -> None:
    rig = crowded()
    until_swapped(rig)
    plan = rig.plans[-1]
    assert {save.page for save in plan.page_saves} & {page for _, _, _, page in plan.page_entries}
    rig.run()
    rig.check()


def test_a_prompt_that_is_set_back_midway_goes_on_with_its_next_chunk() -> None:
    rig = Rig(pages=16, max_rows=4, max_step_tokens=4, decode_steps=1, host_pages=20)
    for token in (3, 4, 5):
        rig.submit([token] * 3, max_tokens=17, ignore_eos=True)
    for _ in range(4):
        rig.turn()
    (young,) = rig.submit([6] * 14, max_tokens=4, ignore_eos=True)
    assert until_swapped(rig) is young
    assert 0 < young.num_computed < 14 and young.num_planned == 0
    rig.run()
    rig.check()
    assert young.num_recomputed == 0


def test_only_live_pages_of_a_window_are_saved() -> None:
    rig = Rig(
        groups=(FULL, sliding(6)), pages=26, max_rows=2, max_step_tokens=8, host_pages=40,
        decode_steps=1,
    )  # fmt: skip
    for start in (1, 2):
        rig.submit(list(range(start, start + 30)), max_tokens=40, ignore_eos=True)
    victim = until_swapped(rig)
    table = victim.host_table
    assert table is not None
    pages = -(-victim.num_computed // rig.page_size)
    assert [len(pages) for pages in table.pages] == [pages, pages - table.first[1]]
    assert table.first == [0, (victim.num_computed - 6 + 1) // rig.page_size]
    rig.run()
    rig.check()
    assert victim.num_recomputed == 0


@pytest.mark.parametrize("host_pages", [0, 3])
def test_a_host_store_that_is_full_means_computing_again(host_pages: int) -> None:
    rig = crowded(host_pages=host_pages)
    rig.run()
    rig.check()
    young = rig.sequences[1]
    assert young.num_preemptions >= 1 and young.num_recomputed > 4 and young.num_swapped == 0


def test_recompute_always_leaves_the_host_alone() -> None:
    rig = crowded(preemption="recompute")
    rig.run()
    rig.check()
    assert rig.sequences[1].num_recomputed > 4
    assert not any(plan.page_saves or plan.page_loads for plan in rig.plans)


@pytest.mark.parametrize("turns", range(8))
def test_the_end_comes_in_any_state(turns: int) -> None:
    """While saving, while swapped, while its pages are being loaded, and after."""
    rig = crowded()
    victim = until_swapped(rig)
    while turns and victim.reason is None:
        turns -= 1
        rig.turn()
        if turns == 3:
            rig.cancel(rig.sequences[0])  # makes room for the victim
    rig.cancel(victim)
    assert victim.host_table is None and rig.scheduler.swap.num_used == 0
    rig.run()
    rig.check()


def test_a_stop_token_that_was_unread_ends_a_swapped_sequence() -> None:
    def run(seed: int, **sampling) -> tuple[Rig, Sequence]:
        rig = Rig(pages=11, max_rows=2, decode_steps=1, host_pages=20)
        for token, more in ((7, {}), (8, sampling)):
            rig.submit([token] * 4, max_tokens=24, ignore_eos=True, seed=seed, **more)
        return rig, rig.sequences[1]

    stops = {}
    for seed in range(20):
        rig, victim = run(seed)
        until_swapped(rig)
        *before, unread = victim.token_ids[victim.prompt_len :]
        assert len(victim.token_ids) == victim.num_computed + 1
        if unread not in before:
            stops[seed] = unread
    assert len(stops) > 3
    for seed, stop in stops.items():
        rig, victim = run(seed, stop_token_ids=(stop,))
        rig.run()
        rig.check()
        assert victim.num_preemptions == 1 and victim.num_swapped == 0
        assert victim.stop_token_id == stop


@pytest.mark.parametrize(
    ("told", "sampling"),
    [
        (True, {"repetition_penalty": 1.2}),
        (True, {"presence_penalty": 0.5}),
        (True, {"frequency_penalty": 0.5}),
        (True, {"bad_words": ((9, 10),)}),
        (False, {"bad_words": ((9,),), "temperature": 0.5}),
    ],
)
def test_a_returning_sequence_has_its_history(told: bool, sampling: dict) -> None:
    rig = Rig(pages=11, max_rows=2, decode_steps=1, host_pages=20)
    for token in (7, 8):
        rig.submit([token] * 4, max_tokens=24, ignore_eos=True, **sampling)
    rig.run()
    rig.check()
    young = rig.sequences[1]
    returning = [join for plan in rig.plans if plan.page_loads for join in plan.joins]
    expected = young.token_ids[: young.num_swapped] if told else []
    assert [join.prefix for join in returning] == [expected]


def test_a_shared_prompt_is_saved_as_a_copy_of_its_own() -> None:
    rig = Rig(pages=14, max_rows=3, decode_steps=1, host_pages=60)
    rig.submit(list(range(1, 15)), n=3, max_tokens=20, ignore_eos=True)
    rig.run()
    rig.check()
    swapped = [sequence for sequence in rig.sequences if sequence.num_swapped]
    assert swapped and all(s.num_recomputed == 0 for s in rig.sequences)


def _plan(chunk_tokens: int = 0, decode_steps: int = 1) -> Plan:
    chunks = [Chunk(slot=0, start=0, token_ids=[1] * chunk_tokens, samples=True)]
    return Plan(step_id=0, chunks=chunks if chunk_tokens else [], decode_steps=decode_steps)


def test_costs_are_what_was_measured() -> None:
    costs = SwapCosts()
    assert costs.token_ns is None and costs.swap_pays(1, [10])  # nothing is known
    costs.observe(_plan(decode_steps=4), 2, 4_000, (300.0,))
    costs.observe(_plan(chunk_tokens=50), 3, 6_000, (300.0,))
    assert costs.token_ns == pytest.approx((6_000 - 1_000) / 50)
    assert costs.swap_pays(40, [13]) and not costs.swap_pays(38, [13])  # 3,900 against 100 each
    for _ in range(200):
        costs.observe(_plan(chunk_tokens=50), 1, 500, ())
    assert costs.token_ns == pytest.approx(10, rel=0.01)


def test_automatic_choice_follows_the_costs() -> None:
    for page_ns, swapped in ((1.0, True), (1e9, False)):
        rig = crowded(preemption="auto")
        rig.executor.page_ns = (page_ns,)
        rig.executor.device_ns = 10_000
        rig.run()
        rig.check()
        assert (rig.sequences[1].num_swapped > 0) is swapped


def test_what_a_plan_loads_is_not_saved_over_in_it() -> None:
    """A plan's saves come before its loads."""
    pages = PageAllocator(4, [FULL], [50])
    swap = Swap(pages, HostPages([3]), "swap")
    first, second = (new_sequence(pages, 10) for _ in range(2))
    swap.set_back(first)
    swap.tell(saving := Plan(step_id=0))
    assert first.num_computed == 10 and swap.num_used == 3 and swap.num_sequences == 1
    plan = Plan(step_id=1)
    pages.extend(first.table, 10, 11)
    swap.restore(plan, first)
    assert [load.host_page for load in plan.page_loads] == [s.host_page for s in saving.page_saves]
    assert [load.page for load in plan.page_loads] == first.table.pages[0]
    swap.set_back(second)
    swap.tell(plan)
    assert plan.page_saves == [] and second.num_computed == 0  # no room in this plan
    third = new_sequence(pages, 10)
    swap.set_back(third)
    swap.tell(plan := Plan(step_id=2))
    assert len(plan.page_saves) == 3 and swap.num_used == 3


def test_a_save_that_nobody_needs_any_more_is_not_made() -> None:
    pages = PageAllocator(4, [FULL], [50])
    swap = Swap(pages, HostPages([30]), "swap")
    sequence = new_sequence(pages, 10)
    swap.set_back(sequence)
    for _ in range(2):
        swap.drop(sequence)
    swap.tell(plan := Plan(step_id=0))
    assert plan.page_saves == [] and swap.num_used == swap.num_saved == swap.num_sequences == 0


def new_sequence(pages: PageAllocator, num_computed: int) -> Sequence:
    """One whose first positions are computed."""
    table = pages.new_table()
    pages.extend(table, 0, num_computed)
    return Sequence(
        key=("client", 0),
        token_ids=[1] * (num_computed + 1),
        prompt_len=5,
        sampling=SamplingParams(max_tokens=40, seed=0),
        choice=0,
        level=0,
        arrival=0,
        stop_token_ids=frozenset(),
        table=table,
        num_computed=num_computed,
    )


def test_host_pages_are_held_once() -> None:
    """Against a plain model: random takes and releases."""
    random.seed(3)
    sizes = [7, 4]
    pages = HostPages(sizes)
    held: list[HostTable] = []
    for _ in range(10_000):
        wanted = [random.randint(0, 3) for _ in sizes]
        if all(pages.num_free(group) >= count for group, count in enumerate(wanted)):
            table = HostTable([0, 0], [pages.take(*taken) for taken in enumerate(wanted)])
            held.append(table)
        elif held:
            pages.release(held.pop(random.randrange(len(held))))
        for group, size in enumerate(sizes):
            taken = [page for table in held for page in table.pages[group]]
            assert len(taken) == len(set(taken)) == size - pages.num_free(group)
            assert set(taken) <= set(range(size))
        assert pages.num_used == sum(len(p) for table in held for p in table.pages)


WORLDS = [
    {"groups": groups, "page_size": page_size, "pipelined": pipelined, "host_pages": host_pages}
    for groups in ((FULL,), (sliding(6),), (FULL, sliding(9)))
    for page_size in (1, 4)
    for pipelined in (True, False)
    for host_pages in (12, 400)
]


@pytest.mark.parametrize("world", WORLDS, ids=range(len(WORLDS)))
def test_a_thousand_random_interleavings(world: dict) -> None:
    """Crowded pools, priorities, several choices, cancels; 42 scripts in each of 24 worlds."""
    swapped = 0
    for seed in range(42):
        swapped += run_script(random.Random(seed), world)
    assert swapped >= 8  # sequences brought back; without any this would test nothing


def run_script(rng: random.Random, world: dict) -> int:
    """One random script; the sequences that were brought back from the host."""
    longest = 40 if FULL in world["groups"] else 6 + world["page_size"]
    longest = -(-longest // world["page_size"])
    rig = Rig(
        **world,
        pages=longest + rng.choice([2, 4]),
        max_rows=rng.randint(2, 5),
        max_step_tokens=rng.choice([6, 16]),
        decode_steps=rng.choice([1, 3]),
    )
    for _ in range(rng.randint(4, 10)):
        rig.submit(
            [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 20))],
            n=rng.choice([1, 1, 3]),
            priority=rng.randint(0, 2),
            max_tokens=rng.randint(5, 20),
            ignore_eos=rng.random() < 0.7,
            seed=rng.randrange(4),
            presence_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.randint(0, 2))),
        )
        for _ in range(rng.randint(0, 6)):
            rig.turn()
        if rng.random() < 0.3:
            rig.cancel(rng.choice(rig.sequences))
    while rig.scheduler.has_work:
        rig.turn()
        on_host = [s for s in rig.sequences if s.host_table is not None]
        if on_host and rng.random() < 0.1:
            rig.cancel(rng.choice(on_host))
    rig.check()
    return sum(sequence.num_swapped > 0 for sequence in rig.sequences)
