"""The cache of pages by content against a plain model: token tuples, holders and their order."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict

import pytest

from jaxserve.config import CacheConfig
from jaxserve.scheduler.host_pages import HostPages
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.pool import PagePool
from jaxserve.scheduler.prefix import PrefixCache
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.scheduler.spill import Spill
from jaxserve.scheduler.swap_costs import SwapCosts
from jaxserve.types import SamplingParams
from tests.fakes.executor import FULL, sliding

#: What a page holds: who may share it, and all tokens up to its end.
Content = tuple[str, str, tuple[int, ...]]


def sequence_of(cache: PrefixCache, pages: PageAllocator, tokens: list[int], **who) -> Sequence:
    """A sequence that waits."""
    return Sequence(
        key=("client", 0),
        token_ids=list(tokens),
        prompt_len=len(tokens),
        sampling=SamplingParams(max_tokens=1000, seed=0),
        choice=0,
        level=0,
        arrival=0,
        stop_token_ids=frozenset(),
        table=pages.new_table(),
        root=cache.root(who.get("tenant", ""), who.get("cache_salt", "")),
    )


def cache_of(pages: PageAllocator, model: str = "model", **config) -> PrefixCache:
    """A cache without a host store."""
    spill = Spill(pages, HostPages([0] * len(pages.pools)))
    return PrefixCache(pages, spill, SwapCosts(), CacheConfig(**config), model)


class World:
    """The real cache beside a model that keeps whole token tuples instead of digests.

    The model says what every page holds, which contents can be found, and in which order those that
    nobody holds are to be evicted.
    """

    def __init__(self, groups, page_size: int, num_pages: int, isolation: str, seed: int) -> None:
        self.size = page_size
        self.groups = groups
        self.pages = PageAllocator(page_size, groups, [num_pages] * len(groups))
        self.cache = cache_of(self.pages, isolation=isolation)
        self.pages.watch_evictions(self._evicted)
        self.isolation = isolation
        self.random = random.Random(seed)
        self.live: dict[Sequence, tuple[str, str]] = {}
        self.written: list[dict[int, Content]] = [{} for _ in groups]  # by page
        self.findable: list[dict[Content, int]] = [{} for _ in groups]
        self.kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in groups]
        self.counts: Counter[str] = Counter()

    def content(self, sequence: Sequence, index: int) -> Content:
        """What page `index` of a sequence must hold."""
        tenant, salt = self.live[sequence]
        tenant = tenant if self.isolation == "tenant" else ""
        return (tenant, salt, tuple(sequence.token_ids[: (index + 1) * self.size]))

    def _evicted(self, group: int, page: int, digest: bytes) -> None:
        oldest, _ = self.kept[group].popitem(last=False)
        assert page == oldest  # the least recently used
        del self.findable[group][self.written[group].pop(page)]
        self.counts["evicted"] += 1

    # -------------------------------------------------------------- operations

    def submit(self) -> None:
        draw = self.random
        stem = [draw.randrange(2)] * draw.randrange(0, 6 * self.size)
        tokens = stem + [draw.randrange(3) for _ in range(draw.randrange(1, 2 * self.size + 2))]
        who = {"tenant": draw.choice(["", "a", "ab"]), "cache_salt": draw.choice(["", "b", "bc"])}
        sequence = sequence_of(self.cache, self.pages, tokens, **who)
        self.live[sequence] = (who["tenant"], who["cache_salt"])
        self.look(sequence)

    def look(self, sequence: Sequence) -> None:
        """The hit is the longest that the model knows of, and every page is the right one."""
        start = sequence.num_computed // self.size
        limit = (len(sequence.token_ids) - 1) // self.size
        expected = sequence.num_computed
        for end in range(limit, start, -1):
            if all(
                self._could_have(sequence, group, start, end) for group in range(len(self.groups))
            ):
                expected = end * self.size
                break
        held = self._held(sequence)
        entries = self.cache.find(sequence)
        assert sequence.num_computed == expected
        for group, index, page in entries:
            assert index >= start and sequence.table.pages[group][index] == page
            assert self.written[group][page] == self.content(sequence, index)
            self.kept[group].pop(page, None)
        self.counts["hit" if entries else "miss"] += 1
        self._settle(held)

    def _could_have(self, sequence: Sequence, group: int, start: int, end: int) -> bool:
        window = self.groups[group].window
        first = 0 if window is None else max(end * self.size - window + 1, 0) // self.size
        return sequence.table.num_behind[group] <= max(first, 0) and all(
            index < start or self.content(sequence, index) in self.findable[group]
            for index in range(first, end)
        )

    def compute(self, sequence: Sequence) -> None:
        """A chunk is launched; then its full pages are registered."""
        start = sequence.num_computed
        end = min(start + self.random.randrange(1, 3 * self.size), len(sequence.token_ids))
        if end == start:  # decode: a token more
            sequence.token_ids.append(self.random.randrange(3))
            end += 1
        held = self._held(sequence)
        entries = self.pages.extend(sequence.table, start, end)
        self._settle(held)
        if entries is None:
            self.counts["full"] += 1
            return
        for group, pages in enumerate(sequence.table.pages):
            for index in range(start // self.size, -(-end // self.size)):
                assert pages[index] not in self.findable[group].values()  # never written again
                self.written[group][pages[index]] = self.content(sequence, index)
        sequence.num_computed = sequence.num_reached = end
        before = [list(pages) for pages in sequence.table.pages]
        first = sequence.table.num_registered
        self.cache.register(sequence, end)
        for group, pages in enumerate(before):
            for index in range(max(first, sequence.table.num_behind[group]), end // self.size):
                content, now = self.content(sequence, index), sequence.table.pages[group][index]
                found = self.findable[group].setdefault(content, pages[index])
                assert now == found and self.written[group][now] == content
                self.kept[group].pop(now, None)
                self.counts["moved"] += now != pages[index]
        self.cache.tell(Plan(step_id=0))

    def leave(self, sequence: Sequence) -> None:
        """It ends, or is set back to look again."""
        held = self._held(sequence)
        self.pages.release(sequence.table)
        for group, pages in enumerate(held):
            self._settle_group(group, reversed(pages))
        if self.random.random() < 0.5:
            sequence.num_computed = 0
            self.look(sequence)
            self.counts["set back"] += 1
        else:
            del self.live[sequence]

    # -------------------------------------------------------------- accounts

    def _held(self, sequence: Sequence) -> list[list[int]]:
        """A sequence's pages by group."""
        table = sequence.table
        return [pages[b:] for pages, b in zip(table.pages, table.num_behind, strict=True)]

    def _settle(self, before: list[list[int]]) -> None:
        for group, pages in enumerate(before):
            self._settle_group(group, pages)

    def _settle_group(self, group: int, pages) -> None:
        """Pages that nobody holds any more, in the order in which they were given back."""
        held = self.holders(group)
        for page in pages:
            if page not in held and page in self.findable[group].values():
                self.kept[group].setdefault(page)

    def holders(self, group: int) -> Counter[int]:
        """How often each page is held, counted from the tables."""
        return Counter(
            page
            for sequence in self.live
            for page in sequence.table.pages[group][sequence.table.num_behind[group] :]
        )

    def check(self) -> None:
        for group, pool in enumerate(self.pages.pools):
            held = self.holders(group)
            assert 0 not in held
            assert held == Counter({page: pool.num_holders(page) for page in held})
            assert pool.num_used == len(held)
            assert pool.num_kept == len(self.kept[group])
            assert not held.keys() & self.kept[group].keys()
            assert pool.num_free == pool.capacity - len(held)
            for content, page in self.findable[group].items():
                assert page in held or page in self.kept[group]
                assert self.written[group][page] == content


@pytest.mark.parametrize("isolation", ["tenant", "none"])
@pytest.mark.parametrize(
    ("groups", "page_size"),
    [((FULL,), 4), ((FULL,), 1), ((FULL, sliding(6)), 3), ((sliding(5),), 2), ((sliding(1),), 2)],
)
def test_2500_random_operations_agree_with_the_model(groups, page_size, isolation):
    """25,000 in all: no page leaked, no wrong hit, the longest hit, the oldest evicted."""
    world = World(groups, page_size, num_pages=40, isolation=isolation, seed=page_size)
    for _ in range(2500):
        action = world.random.random()
        known = list(world.live)
        if action < 0.2 or not known:
            world.submit()
        elif action < 0.85:
            world.compute(world.random.choice(known[-6:]))
        else:
            world.leave(world.random.choice(known))
        if len(world.live) > 12:
            world.leave(next(iter(world.live)))
        world.check()
    for sequence in list(world.live):
        world.live.pop(sequence)
        world.pages.release(sequence.table)
    assert world.pages.num_used == 0
    assert all(pool.num_free == 39 for pool in world.pages.pools)
    wanted = ["miss", "evicted", "set back", "moved"]
    if groups != (sliding(1),):  # nothing before a token is needed: found without any page
        wanted.append("hit")
    if FULL in groups:
        wanted.append("full")
    assert all(world.counts[name] > 20 for name in wanted), world.counts


# ---------------------------------------------------------------------------- single rules


def make(groups=(FULL,), page_size: int = 4, num_pages: int = 20, **config):
    pages = PageAllocator(page_size, groups, [num_pages] * len(groups))
    return pages, cache_of(pages, **config)


def computed(pages: PageAllocator, cache: PrefixCache, tokens: list[int], **who) -> Sequence:
    """A sequence whose tokens have all been run and registered."""
    sequence = sequence_of(cache, pages, tokens, **who)
    assert pages.extend(sequence.table, 0, len(tokens)) is not None
    sequence.num_computed = len(tokens)
    cache.register(sequence, len(tokens))
    return sequence


@pytest.mark.parametrize(("length", "found"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_the_last_known_token_is_never_found(length, found):
    pages, cache = make()
    tokens = list(range(12))
    computed(pages, cache, tokens)
    sequence = sequence_of(cache, pages, tokens[:length])
    cache.find(sequence)
    assert sequence.num_computed == found
    assert cache.num_cached(tokens[:length], sequence.root) == found


def test_what_nobody_holds_is_found_until_it_is_evicted_the_deepest_first():
    pages, cache = make(num_pages=4)
    evicted = []
    pages.watch_evictions(lambda group, page, digest: evicted.append((group, page, digest)))
    sequence = computed(pages, cache, list(range(12)))
    held, digests = list(sequence.table.pages[0]), list(sequence.digests)
    pages.release(sequence.table)
    assert (pages.num_used, pages.num_kept, pages.pools[0].num_free) == (0, 3, 3)
    for left in (8, 4, 0):
        pages.pools[0].take()
        again = sequence_of(cache, pages, list(range(12)))
        assert cache.num_cached(again.token_ids, again.root) == left
    assert evicted == [(0, page, digest) for page, digest in zip(held, digests, strict=True)][::-1]
    assert pages.num_evicted == 3


@pytest.mark.parametrize(
    ("isolation", "own", "other", "shared"),
    [
        ("tenant", {"tenant": "a"}, {"tenant": "a"}, True),
        ("tenant", {"tenant": "a"}, {"tenant": "b"}, False),
        ("none", {"tenant": "a"}, {"tenant": "b"}, True),
        ("none", {"cache_salt": "a"}, {"cache_salt": "b"}, False),
        ("tenant", {"tenant": "ab"}, {"tenant": "a", "cache_salt": "b"}, False),
        ("tenant", {"tenant": "", "cache_salt": "ab"}, {"tenant": "ab"}, False),
        ("none", {"tenant": "a", "cache_salt": "b"}, {"tenant": "c", "cache_salt": "b"}, True),
    ],
)
def test_who_shares_with_whom(isolation, own, other, shared):
    pages, cache = make(isolation=isolation)
    computed(pages, cache, list(range(12)), **own)
    sequence = sequence_of(cache, pages, list(range(12)), **other)
    cache.find(sequence)
    assert sequence.num_computed == (8 if shared else 0)


def test_another_model_shares_nothing():
    pages, cache = make()
    assert cache.root("", "") != cache_of(pages, model="another").root("", "")


def test_pages_computed_twice_are_held_once_and_the_row_is_told():
    pages, cache = make()
    first = computed(pages, cache, list(range(9)))
    second = sequence_of(cache, pages, list(range(9)))
    pages.extend(second.table, 0, 9)
    second.num_computed, second.slot, second.state = 9, 5, SequenceState.DECODING
    own = list(second.table.pages[0])
    cache.register(second, 9)
    assert second.table.pages[0] == [*first.table.pages[0][:2], own[2]]
    assert pages.num_used == 4
    plan = Plan(step_id=0)
    cache.tell(plan)
    told = [(slot, index, page) for _, slot, index, page in plan.page_entries]
    assert told == [(5, 0, first.table.pages[0][0]), (5, 1, first.table.pages[0][1])]
    cache.tell(plan)
    assert len(plan.page_entries) == 2  # once


def test_a_window_needs_only_the_pages_that_the_next_token_sees():
    pages, cache = make(groups=(FULL, sliding(6)), num_pages=30)
    sequence = computed(pages, cache, list(range(40)))
    pages.release_behind(sequence.table, 40)
    window = pages.pools[1]
    while window.num_kept:  # what the window has passed is evicted
        window.take()
    again = sequence_of(cache, pages, list(range(41)))
    assert {group for group, _, _ in cache.find(again)} == {0, 1}
    assert again.num_computed == 40
    # Position 40 sees 35 to 40: page 8 and on.
    assert again.table.num_behind == [0, 8]
    assert again.table.pages[1] == [0] * 8 + sequence.table.pages[1][8:]
    shorter = sequence_of(cache, pages, list(range(37)))
    cache.find(shorter)
    assert shorter.num_computed == 0  # position 36 sees page 7, which is gone


def test_a_shared_page_is_copied_before_it_is_written_a_findable_one_too():
    pages, cache = make(num_pages=3)
    sequence = computed(pages, cache, list(range(4)))
    (page,) = sequence.table.pages[0]
    assert pages.own(sequence.table, 3) == [(0, page, sequence.table.pages[0][0])]
    assert sequence.table.pages[0][0] != page
    assert cache.num_cached(list(range(5)), sequence.root) == 4  # still there
    other = pages.new_table()
    pages.extend(other, 0, 4)  # the last page: what could be found is evicted
    assert pages.pools[0].num_free == 0
    copy = sequence.table.pages[0][0]
    pages.pools[0].register(copy, b"a digest")
    assert pages.own(sequence.table, 3) == []  # no page to copy to: written in place, and forgotten
    assert pages.pools[0].find(b"a digest") is None


def test_a_page_has_one_content():
    pool = PagePool(3)
    page = pool.take()
    pool.register(page, b"one")
    assert pool.register(page, b"one") == page
    with pytest.raises(AssertionError, match="two contents"):
        pool.register(page, b"two")


def test_off_finds_hashes_and_keeps_nothing():
    pages, cache = make(prefix=False)
    sequence = computed(pages, cache, list(range(12)))
    pages.release(sequence.table)
    again = sequence_of(cache, pages, list(range(12)))
    assert cache.find(again) == [] and cache.num_cached(again.token_ids, again.root) == 0
    cache.joined(again)
    assert (cache.num_lookup_tokens, pages.num_kept, sequence.digests) == (0, 0, [])


def test_a_prompt_that_is_not_there_is_not_hashed_whole():
    pages, cache = make(page_size=1, num_pages=3000)
    sequence = sequence_of(cache, pages, list(range(2000)))
    assert cache.find(sequence) == []
    assert len(sequence.digests) <= 16
