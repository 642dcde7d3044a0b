"""KV pages: a reference-counting pool per cache group, and the page tables of sequences.

The scheduler asks here for the pages a step's tokens are written to; the answers travel to the
device as page-table deltas. All integers, no device memory.

Invariants: page 0 is never handed out (padding writes go there). A page can be taken exactly when
its reference count is 0. Tables of full-attention groups only grow; a sliding-window group gives
back the pages that lie wholly behind the window, leaving 0 in their places.

A full page may be registered under a digest of its content (`scheduler.prefix`). It is then
findable, never written again, and kept when its last holder leaves, until it is the least recently
used one and a page is needed.

A page may be handed out while an earlier, already launched step still reads or writes it: device
calls form one chain (each takes the cache the one before returned), so the new owner's writes come
later, and a row reads only positions that it wrote itself or shares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from jaxserve.types import CacheGroup

#: Told of a page that is about to lose its content: its number and its digest.
OnEvict = Callable[[int, bytes], None]


class PagePool:
    """Reference counts, free list and digests of one group's pages.

    Attributes:
        capacity: pages that can be handed out; page 0 is not among them.
        num_evicted: findable pages that were taken for other content so far.
        on_evict: called before a findable page is handed out for other content.
    """

    __slots__ = (
        "_digests",
        "_free",
        "_kept",
        "_references",
        "_registered",
        "capacity",
        "num_evicted",
        "on_evict",
    )

    def __init__(self, num_pages: int, on_evict: OnEvict | None = None) -> None:
        self.capacity = num_pages - 1
        self.num_evicted = 0
        self.on_evict = on_evict
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages  # of the registered pages
        self._registered: dict[bytes, int] = {}
        # Registered and held by nobody, least recently used first. A plain dict would search for
        # its first entry over all that were deleted before it.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.capacity - len(self._free) - len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and that can still be found."""
        return len(self._kept)

    def take(self) -> int:
        """A page without content, held once. The caller has looked at `num_free`."""
        if not self._free:
            self._evict(1)
        page = self._free.pop()
        self._references[page] = 1
        return page

    def take_several(self, num_pages: int) -> list[int]:
        """So many pages without content, each held once, likewise."""
        free, references = self._free, self._references
        if num_pages > len(free):
            self._evict(num_pages - len(free))
        first = len(free) - num_pages
        taken = free[first:]
        del free[first:]
        for page in taken:
            references[page] = 1
        return taken

    def share(self, page: int) -> None:
        """One more holder of a page that is held or can be found."""
        if self._references[page] == 0:
            assert page in self._kept, f"page {page} is free"
            del self._kept[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees it, or leaves it to be found."""
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] -= 1
        if self._references[page] == 0:
            if self._digests[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def release_several(self, pages: Iterable[int]) -> None:
        """One holder less of each."""
        references, digests = self._references, self._digests
        kept, free = self._kept, self._free
        for page in pages:
            if references[page] != 1:
                self.release(page)
                continue
            references[page] = 0
            if digests[page] is None:
                free.append(page)
            else:
                kept[page] = None

    def num_holders(self, page: int) -> int:
        """How often the page is held."""
        return self._references[page]

    def find(self, digest: bytes) -> int | None:
        """The page of this content, held or kept."""
        return self._registered.get(digest)

    def register(self, page: int, digest: bytes) -> int:
        """Makes a held page findable, unless another has the same content.

        Returns:
            The page that is found under the digest from now on.
        """
        found = self._registered.setdefault(digest, page)
        if found == page:
            known = self._digests[page]
            assert known is None or known == digest, f"page {page} has two contents"
            self._digests[page] = digest
        return found

    def register_several(
        self, pages: Sequence[int], digests: Sequence[bytes]
    ) -> list[tuple[int, int]]:
        """Makes held pages findable, each unless another has the same content.

        Args:
            digests: of the pages, in their order.

        Returns:
            (index, page) of the contents that another page has; it is found from now on.
        """
        registered, known = self._registered, self._digests
        elsewhere = []
        for index, digest in enumerate(digests):
            page = pages[index]
            found = registered.setdefault(digest, page)
            if found == page:
                assert known[page] in (None, digest), f"page {page} has two contents"
                known[page] = digest
            else:
                elsewhere.append((index, found))
        return elsewhere

    def is_registered(self, page: int) -> bool:
        """Whether the page can be found, and so must not be written."""
        return self._digests[page] is not None

    def forget(self, page: int) -> None:
        """A registered page that is held can be found no more, and may be written."""
        digest = self._digests[page]
        assert digest is not None, f"page {page} cannot be found"
        self._digests[page] = None
        del self._registered[digest]

    def _evict(self, num_pages: int) -> None:
        """Frees so many kept pages, the least recently used ones."""
        kept, digests, registered = self._kept, self._digests, self._registered
        on_evict, free = self.on_evict, self._free
        for _ in range(num_pages):
            page, _ = kept.popitem(last=False)
            digest = digests[page]
            assert digest is not None, f"page {page} cannot be found"
            digests[page] = None
            del registered[digest]
            free.append(page)
            if on_evict is not None:
                on_evict(page, digest)
        self.num_evicted += num_pages


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence.

    Attributes:
        pages: by group; entry i holds positions i × page size and on; 0 where given back.
        num_behind: by group, entries given back because the window has passed them.
        num_registered: entries, from the first one on, whose pages can be found by others.
    """

    pages: list[list[int]]
    num_behind: list[int]
    num_registered: int = 0


class PageAllocator:
    """Hands pages of all cache groups to sequences.

    Args:
        page_size: tokens a page.
        groups: the model's cache groups.
        num_pages: pages of each group's pool, page 0 included.

    Attributes:
        windows: by group; None where it sees all positions.
    """

    def __init__(
        self, page_size: int, groups: Sequence[CacheGroup], num_pages: Sequence[int]
    ) -> None:
        self.page_size = page_size
        self.pools = [PagePool(pages) for pages in num_pages]
        self.windows = [group.window for group in groups]
        self._has_windows = any(window is not None for window in self.windows)

    @property
    def num_used(self) -> int:
        """Pages held, of all groups."""
        return sum(pool.num_used for pool in self.pools)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and that can still be found, of all groups."""
        return sum(pool.num_kept for pool in self.pools)

    @property
    def num_evicted(self) -> int:
        """Findable pages that were taken for other content so far, of all groups."""
        return sum(pool.num_evicted for pool in self.pools)

    @property
    def capacity(self) -> int:
        """Pages that can be held, of all groups."""
        return sum(pool.capacity for pool in self.pools)

    def watch_evictions(self, on_evict: Callable[[int, int, bytes], None]) -> None:
        """Has `on_evict(group, page, digest)` called before a findable page loses its content.

        It is called in the middle of a plan: the page holds its content until that plan's step.
        """
        for group, pool in enumerate(self.pools):
            pool.on_evict = partial(on_evict, group)

    @property
    def capacity_tokens(self) -> int:
        """Positions that the largest pool can hold."""
        return max((pool.capacity for pool in self.pools), default=0) * self.page_size

    def new_table(self) -> PageTable:
        """A table without pages."""
        return PageTable([[] for _ in self.pools], [0] * len(self.pools))

    def fits_alone(self, num_positions: int) -> bool:
        """Whether a sequence of so many positions can ever run, alone, in small enough chunks."""
        for pool, window in zip(self.pools, self.windows, strict=True):
            pages = self._num_pages(num_positions)
            if window is not None:
                pages = min(pages, self._num_pages(window) + 1)
            if pages > pool.capacity:
                return False
        return True

    def can_hold(
        self, table: PageTable, num_positions: int, chunk_tokens: int, reserve: int
    ) -> bool:
        """Whether a sequence of so many positions can be brought in, `reserve` pages left free.

        Args:
            chunk_tokens: tokens that one step may bring; they all lie in a window group at once.
        """
        for group, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            pages = self._num_pages(num_positions)
            if window is not None:
                pages = min(pages, self._num_pages(window + chunk_tokens) + 1)
            held = len(table.pages[group]) - table.num_behind[group]
            if pages - held + reserve > pool.num_free:
                return False
        return True

    def extend(self, table: PageTable, start: int, end: int) -> list[tuple[int, int, int]] | None:
        """Gives a table the pages for a step's positions start … end - 1.

        Pages behind the window of the step's first query are given back first.

        Returns:
            (group, index, page) of each new entry; None, and no page taken, if there are too few.
        """
        firsts = [len(pages) for pages in table.pages]
        if not self.grow(table, start, end):
            return None
        return [
            (group, index, pages[index])
            for group, (first, pages) in enumerate(zip(firsts, table.pages, strict=True))
            for index in range(first, len(pages))
        ]

    def grow(self, table: PageTable, start: int, end: int) -> bool:
        """As `extend`, for who enters the whole table later; whether there were enough pages."""
        if self._has_windows:
            self.release_behind(table, start)
        num_pages = -(-end // self.page_size)
        for pool, pages in zip(self.pools, table.pages, strict=True):
            if num_pages - len(pages) > pool.num_free:
                return False
        for pool, pages in zip(self.pools, table.pages, strict=True):
            if len(pages) < num_pages:
                pages += pool.take_several(num_pages - len(pages))
        return True

    def open_each(
        self, tables: Sequence[tuple[PageTable, int, int]]
    ) -> list[tuple[int, int, int, int]] | None:
        """`extend` by one position for many tables at once, where no window has to be minded.

        Args:
            tables: each with its slot and the position, whose page alone it may lack.

        Returns:
            (group, slot, index, page) of each new entry; None, and no page taken, if there are too
            few for all, or a group has a window.
        """
        if self._has_windows or any(pool.num_free < len(tables) for pool in self.pools):
            return None
        entries: list[tuple[int, int, int, int]] = []
        for group, pool in enumerate(self.pools):
            taken = pool.take_several(len(tables))
            for table, slot, position in tables:
                pages, index = table.pages[group], position // self.page_size
                if len(pages) == index:
                    page = taken.pop()
                    pages.append(page)
                    entries.append((group, slot, index, page))
            for page in taken:  # some tables had theirs
                pool.release(page)
        return entries

    def reachable(self, table: PageTable, start: int) -> int:
        """The largest `end` that `extend(table, start, end)` could serve now."""
        self.release_behind(table, start)
        return min(
            (len(pages) + pool.num_free) * self.page_size
            for pool, pages in zip(self.pools, table.pages, strict=True)
        )

    def share(self, table: PageTable, num_positions: int) -> PageTable:
        """A table that shares the pages of another's first positions."""
        num_pages = self._num_pages(num_positions)
        shared = PageTable([pages[:num_pages] for pages in table.pages], list(table.num_behind))
        for group, pages in enumerate(shared.pages):
            for page in pages[shared.num_behind[group] :]:
                self.pools[group].share(page)
        return shared

    def own(self, table: PageTable, position: int) -> list[tuple[int, int, int]] | None:
        """Makes the page of `position` the table's own before it is written (copy on write).

        Returns:
            (group, source, target) of each page to copy; None, and nothing changed, if there are
            too few free pages. A page that nobody else holds or can find stays as it is; so does a
            findable one when no page is free, but it can be found no more then.
        """
        index = position // self.page_size
        to_copy = []
        to_forget = []
        for group, (pool, pages) in enumerate(zip(self.pools, table.pages, strict=True)):
            if index >= len(pages):
                continue
            if pool.num_holders(pages[index]) > 1:
                if pool.num_free == 0:
                    return None
                to_copy.append(group)
            elif pool.is_registered(pages[index]):
                (to_copy if pool.num_free else to_forget).append(group)
        for group in to_forget:
            self.pools[group].forget(table.pages[group][index])
        copies = []
        for group in to_copy:
            pool, pages = self.pools[group], table.pages[group]
            target = pool.take()
            copies.append((group, pages[index], target))
            pool.release(pages[index])
            pages[index] = target
        return copies

    def entries(self, table: PageTable, slot: int) -> list[tuple[int, int, int, int]]:
        """(group, slot, index, page) of all pages that a table holds."""
        return [
            (group, slot, index, page)
            for group, (pages, behind) in enumerate(zip(table.pages, table.num_behind, strict=True))
            for index, page in enumerate(pages[behind:] if behind else pages, behind)
        ]

    def release(self, table: PageTable) -> None:
        """Gives all pages back; the table is empty then.

        The last ones first: a page that can be found is of use only with those before it.
        """
        for group, pages in enumerate(table.pages):
            self.pools[group].release_several(reversed(pages[table.num_behind[group] :]))
            pages.clear()
            table.num_behind[group] = 0
        table.num_registered = 0

    def release_behind(self, table: PageTable, query: int) -> None:
        """Gives back the pages that a query at this position, and later ones, cannot see."""
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            pages = table.pages[group]
            num_behind = min(self.num_behind(group, query), len(pages))
            for index in range(table.num_behind[group], num_behind):
                self.pools[group].release(pages[index])
                pages[index] = 0
            table.num_behind[group] = max(table.num_behind[group], num_behind)

    def num_behind(self, group: int, query: int) -> int:
        """Pages of a sequence that lie wholly behind the group's window for a query."""
        window = self.windows[group]
        return 0 if window is None else max(query - window + 1, 0) // self.page_size

    def _num_pages(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)
