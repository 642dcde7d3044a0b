"""The allocator against a plain model that keeps sets of holders."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.pages import PageAllocator, PageTable
from jaxserve.scheduler.pool import STOCK, PagePool
from tests.fakes.executor import FULL, sliding

PAGE = 4
NUM_PAGES = 9
WINDOW = 6


@dataclass
class Holder:
    """A row with a table."""

    table: PageTable
    slot: int


def holders(allocator: PageAllocator, tables: list[PageTable], group: int) -> Counter[int]:
    """How often each page is held, counted from the tables."""
    return Counter(
        page for table in tables for page in table.pages[group][table.num_behind[group] :]
    )


steps = st.lists(
    st.tuples(
        st.sampled_from(["new", "extend", "share", "own", "release"]),
        st.integers(0, 100),
        st.integers(1, 12),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_references_equal_the_tables_that_hold_a_page(script):
    allocator = PageAllocator(PAGE, (FULL, sliding(WINDOW)), (NUM_PAGES, NUM_PAGES))
    tables: dict[int, PageTable] = {}
    lengths: dict[int, int] = {}
    for number, (action, pick, amount) in enumerate(script):
        known = sorted(tables)
        chosen = known[pick % len(known)] if known else None
        if action == "new":
            tables[number], lengths[number] = allocator.new_table(), 0
        elif chosen is None:
            continue
        elif action == "extend":
            free = [pool.num_free for pool in allocator.pools]
            start, end = lengths[chosen], lengths[chosen] + amount
            entries = allocator.extend(tables[chosen], start, end)
            if entries is None:
                assert any(-(-end // PAGE) > f for f in free)  # it was truly short
                assert allocator.reachable(tables[chosen], start) < end
            else:
                lengths[chosen] = end
                for group, index, page in entries:
                    assert page != 0 and tables[chosen].pages[group][index] == page
                oldest = max(start - WINDOW + 1, 0)  # all that the next query sees is there
                window_pages = tables[chosen].pages[1]
                assert all(window_pages[p // PAGE] for p in range(oldest, end))
                assert all(tables[chosen].pages[0])
        elif action == "share" and lengths[chosen]:
            tables[number] = allocator.share(tables[chosen], lengths[chosen])
            lengths[number] = lengths[chosen]
        elif action == "own" and lengths[chosen]:
            position = lengths[chosen] - 1
            before = [list(pages) for pages in tables[chosen].pages]
            copies = allocator.own(tables[chosen], position)
            for group, source, target in copies or ():
                assert before[group][position // PAGE] == source
                assert tables[chosen].pages[group][position // PAGE] == target
            if copies is not None:
                for group in range(2):
                    page = tables[chosen].pages[group][position // PAGE]
                    assert allocator.pools[group].num_holders(page) == 1
        elif action == "release":
            allocator.release(tables.pop(chosen))
            del lengths[chosen]
        for group, pool in enumerate(allocator.pools):
            held = holders(allocator, list(tables.values()), group)
            assert held == Counter({p: pool.num_holders(p) for p in held})
            assert pool.num_used == len(held)
            assert pool.num_used + pool.num_free == pool.capacity == NUM_PAGES - 1
    for table in tables.values():
        allocator.release(table)
    assert allocator.num_used == 0


def test_a_page_is_handed_out_once_and_page_0_never():
    pool = PagePool(5)
    assert sorted(pool.take() for _ in range(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    pool.share(3)
    pool.release(3)
    assert pool.num_free == 0
    pool.release(3)
    assert pool.take() == 3


def test_several_pages_are_the_free_ones_and_then_the_least_recently_used():
    evicted = []
    pool = PagePool(7, lambda page, digest: evicted.append((page, digest)))
    assert pool.take_several(0) == []
    assert pool.num_free == 6
    pages = pool.take_several(4)
    assert pool.register_several(pages, [b"a", b"b", b"c", b"d"]) == []
    pool.release_several(pages)
    taken = pool.take_several(4)
    assert set(taken[:2]).isdisjoint(pages) and taken[2:] == pages[:2]
    assert evicted == [(pages[0], b"a"), (pages[1], b"b")] and pool.num_evicted == 2
    assert [pool.num_holders(page) for page in taken] == [1] * 4 and pool.num_kept == 2
    assert pool.register_several(taken, [b"e", b"c", b"d", b"f"]) == [(1, pages[2]), (2, pages[3])]
    assert [pool.find(digest) for digest in (b"e", b"a", b"f")] == [taken[0], None, taken[3]]


def test_what_was_taken_lately_is_freed_ahead_within_a_share_of_the_pool():
    evicted = []
    pool = PagePool(1 + 4 * round(1 / STOCK), lambda page, digest: evicted.append(page))
    pages = pool.take_several(pool.capacity)
    digests = [page.to_bytes(2) for page in pages]
    assert pool.register_several(pages, digests) == []
    pool.stock()
    assert evicted == []  # all are held
    pool.release_several(pages)
    pool.stock()
    assert evicted == pages[:4]  # more were taken, but it is a small share
    assert pool.num_free == pool.capacity and pool.num_kept == pool.capacity - 4
    for _ in range(60):  # nobody takes any: no more are freed
        pool.stock()
    taken = pool.take_several(1)
    pool.stock()
    assert evicted == pages[:4] and taken[0] in evicted
    pool.take_several(2)
    pool.stock()
    assert evicted == pages[:7]


def test_a_page_is_freed_by_its_last_holder_only():
    pool = PagePool(5)
    alone, shared, elsewhere = pool.take_several(3)
    pool.share(shared)
    pool.share(elsewhere)
    leaving: dict[int, int] = {}
    assert pool.count_freed([alone, shared, elsewhere], leaving) == 1
    assert pool.count_freed([shared], leaving) == 1
    assert leaving == {shared: 2, elsewhere: 1}


def test_releasing_a_free_page_is_caught():
    pool = PagePool(3)
    with pytest.raises(AssertionError, match="page 2 is free"):
        pool.release(2)


def test_a_short_group_takes_nothing_from_the_other():
    allocator = PageAllocator(PAGE, (FULL, sliding(WINDOW)), (9, 3))
    table = allocator.new_table()
    assert allocator.extend(table, 0, 12) is None
    assert allocator.num_used == 0
    assert allocator.reachable(table, 0) == 8


def test_fits_alone_counts_the_window_only():
    allocator = PageAllocator(PAGE, (sliding(WINDOW),), (4,))
    assert allocator.fits_alone(10_000)
    assert not PageAllocator(PAGE, (sliding(WINDOW),), (3,)).fits_alone(10_000)
    assert PageAllocator(PAGE, (FULL,), (4,)).fits_alone(12)
    assert not PageAllocator(PAGE, (FULL,), (4,)).fits_alone(13)


def test_open_each_is_extend_for_many() -> None:
    allocator = PageAllocator(4, [FULL, FULL], [20, 20])
    tables = [allocator.new_table() for _ in range(3)]
    for table, length in zip(tables, (4, 8, 6), strict=True):
        assert allocator.extend(table, 0, length) is not None
    rows = [Holder(table, slot) for slot, table in enumerate(tables, 7)]
    entries = allocator.open_each(list(zip(rows, (4, 8, 7), strict=True)))
    assert entries is not None
    assert [entry[:3] for entry in entries] == [(0, 7, 1), (0, 8, 2), (1, 7, 1), (1, 8, 2)]
    for group, slot, index, page in entries:
        assert tables[slot - 7].pages[group][index] == page
    held = [page for table in tables for page in table.pages[0]]
    assert len(set(held)) == len(held) == allocator.pools[0].num_used == 7
    assert allocator.open_each([]) == []
    assert allocator.pools[0].num_used == 7


def test_open_each_leaves_it_to_extend_where_pages_run_out_or_a_window_is_minded() -> None:
    allocator = PageAllocator(4, [FULL], [4])
    tables = [allocator.new_table() for _ in range(2)]
    for table in tables:
        assert allocator.extend(table, 0, 4) is not None
    rows = [Holder(table, slot) for slot, table in enumerate(tables)]
    assert allocator.open_each([(row, 4) for row in rows]) is None
    assert allocator.pools[0].num_free == 1
    assert PageAllocator(4, [sliding(WINDOW)], [9]).open_each([]) is None
