"""KV pages: a reference-counting pool per cache group, and the page tables of sequences.

The scheduler asks here for the pages a step's tokens are written to; the answers travel to the
device as page-table deltas. All integers, no device memory.

Invariants: page 0 is never handed out (padding writes go there). A page is free exactly when its
reference count is 0. Tables of full-attention groups only grow; a sliding-window group gives back
the pages that lie wholly behind the window, leaving 0 in their places.

A page may be handed out while an earlier, already launched step still reads or writes it: device
calls form one chain (each takes the cache the one before returned), so the new owner's writes come
later, and a row reads only positions that it wrote itself or shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxserve.types import CacheGroup


class PagePool:
    """Reference counts and free list of one group's pages.

    Attributes:
        capacity: pages that can be handed out; page 0 is not among them.
    """

    __slots__ = ("_free", "_references", "capacity")

    def __init__(self, num_pages: int) -> None:
        self.capacity = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.capacity - len(self._free)

    def take(self) -> int:
        """A free page, held once. The caller has looked at `num_free`."""
        page = self._free.pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that is held."""
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees it."""
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def num_holders(self, page: int) -> int:
        """How often the page is held."""
        return self._references[page]


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence.

    Attributes:
        pages: by group; entry i holds positions i × page size and on; 0 where given back.
        num_behind: by group, entries given back because the window has passed them.
    """

    pages: list[list[int]]
    num_behind: list[int]


class PageAllocator:
    """Hands pages of all cache groups to sequences.

    Args:
        page_size: tokens a page.
        groups: the model's cache groups.
        num_pages: pages of each group's pool, page 0 included.
    """

    def __init__(
        self, page_size: int, groups: Sequence[CacheGroup], num_pages: Sequence[int]
    ) -> None:
        self.page_size = page_size
        self.pools = [PagePool(pages) for pages in num_pages]
        self._windows = [group.window for group in groups]

    @property
    def num_used(self) -> int:
        """Pages held, of all groups."""
        return sum(pool.num_used for pool in self.pools)

    @property
    def capacity(self) -> int:
        """Pages that can be held, of all groups."""
        return sum(pool.capacity for pool in self.pools)

    @property
    def capacity_tokens(self) -> int:
        """Positions that the largest pool can hold."""
        return max((pool.capacity for pool in self.pools), default=0) * self.page_size

    def new_table(self) -> PageTable:
        """A table without pages."""
        return PageTable([[] for _ in self.pools], [0] * len(self.pools))

    def fits_alone(self, num_positions: int) -> bool:
        """Whether a sequence of so many positions can ever run, alone, in small enough chunks."""
        for pool, window in zip(self.pools, self._windows, strict=True):
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
        for group, (pool, window) in enumerate(zip(self.pools, self._windows, strict=True)):
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
        self._release_behind(table, start)
        num_pages = self._num_pages(end)
        for pool, pages in zip(self.pools, table.pages, strict=True):
            if num_pages - len(pages) > pool.num_free:
                return None
        entries = []
        for group, pages in enumerate(table.pages):
            while len(pages) < num_pages:
                page = self.pools[group].take()
                entries.append((group, len(pages), page))
                pages.append(page)
        return entries

    def reachable(self, table: PageTable, start: int) -> int:
        """The largest `end` that `extend(table, start, end)` could serve now."""
        self._release_behind(table, start)
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
            too few free pages. A page that nobody else holds stays as it is.
        """
        index = position // self.page_size
        shared = [
            group
            for group, pages in enumerate(table.pages)
            if index < len(pages) and self.pools[group].num_holders(pages[index]) > 1
        ]
        if any(self.pools[group].num_free == 0 for group in shared):
            return None
        copies = []
        for group in shared:
            pool, pages = self.pools[group], table.pages[group]
            target = pool.take()
            copies.append((group, pages[index], target))
            pool.release(pages[index])
            pages[index] = target
        return copies

    def entries(self, table: PageTable) -> Iterable[tuple[int, int, int]]:
        """(group, index, page) of all pages that a table holds."""
        for group, pages in enumerate(table.pages):
            for index in range(table.num_behind[group], len(pages)):
                yield group, index, pages[index]

    def release(self, table: PageTable) -> None:
        """Gives all pages back; the table is empty then."""
        for group, pages in enumerate(table.pages):
            pool = self.pools[group]
            for page in pages[table.num_behind[group] :]:
                pool.release(page)
            pages.clear()
            table.num_behind[group] = 0

    def _release_behind(self, table: PageTable, query: int) -> None:
        for group, window in enumerate(self._windows):
            if window is None:
                continue
            pages = table.pages[group]
            num_behind = min(max(query - window + 1, 0) // self.page_size, len(pages))
            for index in range(table.num_behind[group], num_behind):
                self.pools[group].release(pages[index])
                pages[index] = 0
            table.num_behind[group] = max(table.num_behind[group], num_behind)

    def _num_pages(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)
