"""Pages in the host's memory: who holds which, as integers.

The device's half (`device.host_store`) owns the bytes; here is only who may write where. A host
page is held by one sequence that was set back, from the plan that saves it to the plan that loads
it, or to the sequence's end.

Invariants: a page is free or held once. A page may be handed out again while an earlier save of it
is still under way, since saves reach the memory in the order of the plans.
"""

from __future__ import annotations

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
    """Free host pages of each cache group.

    Args:
        num_pages: of each group.
    """

    def __init__(self, num_pages: Sequence[int]) -> None:
        self.capacity = sum(num_pages)
        self._free = [list(range(pages - 1, -1, -1)) for pages in num_pages]

    @property
    def num_used(self) -> int:
        """Pages held, of all groups."""
        return self.capacity - sum(map(len, self._free))

    def num_free(self, group: int) -> int:
        """Pages of a group that can be taken now."""
        return len(self._free[group])

    def take(self, group: int, num_pages: int) -> list[int]:
        """So many pages of a group. The caller has looked at `num_free`."""
        free = self._free[group]
        assert num_pages <= len(free)
        taken = free[len(free) - num_pages :]
        del free[len(free) - num_pages :]
        return taken

    def release(self, table: HostTable) -> None:
        """All pages of a table are free again."""
        for free, pages in zip(self._free, table.pages, strict=True):
            free += pages
