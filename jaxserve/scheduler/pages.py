"""Page tables of sequences, over a pool of pages for each cache group (`scheduler.pool`).

The scheduler asks here for the pages a step's tokens are written to; the answers travel to the
device as page-table deltas. All integers, no device memory.

Invariants: tables of full-attention groups only grow; a sliding-window group gives back the pages
that lie wholly behind the window, leaving 0 in their places.

A page may be handed out while an earlier, already launched step still reads or writes it: device
calls form one chain (each takes the cache the one before returned), so the new owner's writes come
later, and a row reads only positions that it wrote itself or shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Protocol

from jaxserve.scheduler.pool import PagePool
from jaxserve.types import CacheGroup


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


class Row(Protocol):
    """Who has a table, and the slot whose rows the device looks up in it."""

    table: PageTable
    slot: int


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

    def stock(self) -> None:
        """As `PagePool.stock`, of every group."""
        for pool in self.pools:
            pool.stock()

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
        num_pages = -(-num_positions // self.page_size)
        for group, pool in enumerate(self.pools):
            window, wanted = self.windows[group], num_pages
            if window is not None:
                wanted = min(wanted, self._num_pages(window + chunk_tokens) + 1)
            held = len(table.pages[group]) - table.num_behind[group]
            if wanted - held + reserve > pool.num_free:
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

    def open_each(self, rows: Sequence[tuple[Row, int]]) -> list[tuple[int, int, int, int]] | None:
        """`extend` by one position for many rows at once, where no window has to be minded.

        Args:
            rows: each with the position, whose page alone it may lack.

        Returns:
            (group, slot, index, page) of each new entry; None, and no page taken, if there are too
            few for all, or a group has a window.
        """
        if self._has_windows or any(pool.num_free < len(rows) for pool in self.pools):
            return None
        entries: list[tuple[int, int, int, int]] = []
        page_size = self.page_size
        for group, pool in enumerate(self.pools):
            taken = pool.take_several(len(rows))
            for row, position in rows:
                pages, index = row.table.pages[group], position // page_size
                if len(pages) == index:
                    page = taken.pop()
                    pages.append(page)
                    entries.append((group, row.slot, index, page))
            for page in taken:  # some rows had theirs
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

    def at(self, table: PageTable, position: int) -> list[int]:
        """The page of a position, of each group."""
        return [pages[position // self.page_size] for pages in table.pages]

    def entries(self, table: PageTable, slot: int) -> list[tuple[int, int, int, int]]:
        """(group, slot, index, page) of all pages that a table holds."""
        entries: list[tuple[int, int, int, int]] = []
        for group, pages in enumerate(table.pages):
            behind = table.num_behind[group]
            held = pages[behind:] if behind else pages
            entries += zip(repeat(group), repeat(slot), range(behind, len(pages)), held)
        return entries

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
