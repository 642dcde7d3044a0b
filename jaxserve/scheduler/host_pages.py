"""Pages in the host's memory: who holds which, as integers.

The device's half (`device.host_store`) owns the bytes; here is only who may write where. A host
page is held by one sequence that was set back, from the plan that saves it to the plan that loads
it, or to the sequence's end; or it is kept under the digest of a cached page's content
(`scheduler.spill`) until its room is needed.

Invariants: a page is free, held once, or kept. A page may be handed out again while an earlier save
of it is still under way, since saves reach the memory in the order of the plans. A pinned page is
about to be loaded, and not handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostTable:
    """A sequence's pages in the host's memory.

    Attributes:
        first: by cache group, the index in the page table of the first page held; those before it
            lie behind the group's window.
        pages: by cache group, the host pages that hold that entry and those after it.
    """

    first: list[int]
    pages: list[list[int]]


class HostPages:
    """Host pages of each cache group: free, held, or kept.

    Args:
        num_pages: of each group.
    """

    def __init__(self, num_pages: Sequence[int]) -> None:
        self.capacity = sum(num_pages)
        self._free = [list(range(pages - 1, -1, -1)) for pages in num_pages]
        # By content, least recently used first.
        self._kept: list[OrderedDict[bytes, int]] = [OrderedDict() for _ in num_pages]
        self._pinned: list[set[int]] = [set() for _ in num_pages]

    @property
    def num_used(self) -> int:
        """Pages held by sequences, of all groups."""
        return self.capacity - sum(map(len, self._free)) - self.num_kept

    @property
    def num_kept(self) -> int:
        """Pages kept for their content, of all groups."""
        return sum(map(len, self._kept))

    def num_free(self, group: int) -> int:
        """Pages of a group that can be taken now."""
        return len(self._free[group]) + len(self._kept[group]) - len(self._pinned[group])

    def take(self, group: int, num_pages: int) -> list[int]:
        """So many pages of a group. The caller has looked at `num_free`."""
        free = self._free[group]
        while len(free) < num_pages:
            free.append(self._forget_oldest(group))
        taken = free[len(free) - num_pages :]
        del free[len(free) - num_pages :]
        return taken

    def release(self, table: HostTable) -> None:
        """All pages of a sequence's table are free again."""
        for free, pages in zip(self._free, table.pages, strict=True):
            free += pages

    def find(self, group: int, digest: bytes) -> int | None:
        """The page kept for this content."""
        return self._kept[group].get(digest)

    def use(self, group: int, digest: bytes) -> int:
        """The page kept for this content, which has been used just now."""
        self._kept[group].move_to_end(digest)
        return self._kept[group][digest]

    def keep(self, group: int, digest: bytes) -> int | None:
        """A page to save this content to; None if it is there, or there is no room."""
        if digest in self._kept[group]:
            self.use(group, digest)
            return None
        if self.num_free(group) == 0:
            return None
        (page,) = self.take(group, 1)
        self._kept[group][digest] = page
        return page

    def pin(self, group: int, page: int) -> None:
        """A kept page stays until `unpin`."""
        self._pinned[group].add(page)

    def unpin(self) -> None:
        """What was pinned has been loaded."""
        for pinned in self._pinned:
            pinned.clear()

    def _forget_oldest(self, group: int) -> int:
        kept, pinned = self._kept[group], self._pinned[group]
        while True:
            digest, page = kept.popitem(last=False)
            if page not in pinned:
                return page
            kept[digest] = page
