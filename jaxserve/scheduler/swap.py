"""Setting a sequence back without losing its cache: its pages go to the host and come again.

    running ──set_back──▶ waiting, pages on the host ──restore──▶ running
                │                     │
                └── recomputed        └── drop: cancelled, stopped

A plan's saves are made before anything else of it, in the device's chain of calls: they read the
pages as of all launched steps, also the tokens that nobody has read back. So the device's pages are
free at once, whoever writes to them comes later. A sequence is let in again when its tokens are
read; then it knows the token after its last computed position, and usually runs that one alone.

Computing again is chosen where the host has no room, or where it is measured to be faster.

Invariants: host pages are released exactly once, whatever happens to their sequence. Those that a
plan loads are handed out again only after it, since a plan's saves come before its loads.
"""

from __future__ import annotations

from jaxserve.scheduler.host_pages import HostPages, HostTable
from jaxserve.scheduler.pages import PageAllocator, PageTable
from jaxserve.scheduler.plan import PageLoad, PageSave, Plan
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.swap_costs import SwapCosts


class Swap:
    """Sequences whose pages are on the host; see the module.

    Args:
        pages: the device's.
        host: the host's; none where there is no host store.
        preemption: "swap" wherever there is room, "recompute" always, or "auto".

    Attributes:
        costs: what "auto" goes by.
        num_sequences: that have pages on the host.
        num_saved, num_loaded: pages so far.
    """

    def __init__(
        self,
        pages: PageAllocator,
        host: HostPages,
        preemption: str = "auto",
    ) -> None:
        self.costs = SwapCosts()
        self.num_sequences = 0
        self.num_saved = self.num_loaded = 0
        self._pages = pages
        self._host = host
        self._preemption = preemption if host.capacity else "recompute"
        self._saves: dict[Sequence, list[PageSave]] = {}  # not in a plan yet
        self._loaded: list[HostTable] = []  # in the plan that is being made

    @property
    def num_used(self) -> int:
        """Host pages held."""
        return self._host.num_used

    @property
    def capacity(self) -> int:
        """Host pages that can be held."""
        return self._host.capacity

    def set_back(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; saves them, or forgets what was computed.

        No chunk of it may be in the plan that is being made.
        """
        assert sequence.host_table is None
        if self._preemption == "recompute" or not self._save(sequence):
            sequence.num_computed = 0
            self._pages.release(sequence.table)

    def _save(self, sequence: Sequence) -> bool:
        """Plans the saves of all that later tokens look at; whether that is possible and pays."""
        table, computed, page_size = sequence.table, sequence.num_computed, self._pages.page_size
        end = -(-computed // page_size)
        first = [
            0 if window is None else min(max(computed - window + 1, 0) // page_size, end)
            for window in self._pages.windows
        ]
        needed = [end - start for start in first]
        if not computed or any(
            pages > self._host.num_free(group) for group, pages in enumerate(needed)
        ):
            return False
        if self._preemption == "auto" and not self.costs.swap_pays(computed, needed):
            return False
        host = HostTable(first, [self._host.take(*taken) for taken in enumerate(needed)])
        self._saves[sequence] = [
            PageSave(group=group, page=page, host_page=host_page)
            for group, start in enumerate(first)
            for page, host_page in zip(
                table.pages[group][start:end], host.pages[group], strict=True
            )
        ]
        self._pages.release(table)
        # What lies behind the window is not asked for again: as if given back while it ran.
        sequence.table = PageTable([[0] * start for start in first], list(first))
        sequence.host_table = host
        self.num_sequences += 1
        return True

    def restore(self, plan: Plan, sequence: Sequence) -> None:
        """Plans the loads of a sequence that has been given a slot and pages again."""
        host = sequence.host_table
        if host is None:
            return
        for group, (start, host_pages) in enumerate(zip(host.first, host.pages, strict=True)):
            pages = sequence.table.pages[group][start : start + len(host_pages)]
            plan.page_loads += [
                PageLoad(group=group, host_page=host_page, page=page)
                for host_page, page in zip(host_pages, pages, strict=True)
            ]
        sequence.num_swapped += sequence.num_computed
        sequence.host_table = None
        self.num_sequences -= 1
        self._loaded.append(host)

    def drop(self, sequence: Sequence) -> None:
        """A waiting sequence has ended: what it has on the host is not needed."""
        host = sequence.host_table
        if host is not None:
            self._saves.pop(sequence, None)
            sequence.host_table = None
            self.num_sequences -= 1
            self._host.release(host)

    def tell(self, plan: Plan) -> None:
        """Moves the saves since the last plan into this one, which is complete."""
        for saves in self._saves.values():
            plan.page_saves += saves  # behind those of the cache: they may take over their pages
        self.num_saved += len(plan.page_saves)
        self.num_loaded += len(plan.page_loads)
        self._saves = {}
        for host in self._loaded:
            self._host.release(host)
        self._loaded = []
