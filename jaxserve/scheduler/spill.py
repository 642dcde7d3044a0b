"""Cached pages that the device had to give up, kept in the host's memory.

    cached on the device ──evicted──▶ kept on the host ──found──▶ loaded into a page of the device
                                             │
                                             └── room is needed: least recently used first

A page that is evicted in the middle of a plan is saved by that plan, before anything else of it
writes. One that is found there is loaded by the plan that gives it to a sequence, before its step
reads. What is loaded stays on the host too, so that it need not be saved again.

Sequences that were set back come first: their pages take the place of kept ones.

Saving costs time in every step, and brings nothing where nobody asks again. So it is done on
credit: a saved page costs one, a loaded one earns several. Once the credit is used up saving stops,
but for a run of pages now and then, by which it is noticed when that changes.

Invariants: a host page that a plan loads is not written by the same plan's saves (it is pinned
until the plan is launched). A page of the device that is given up before its load was launched is
neither loaded nor saved.
"""

from __future__ import annotations

from jaxserve.scheduler.host_pages import HostPages
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.plan import PageLoad, PageSave, Plan

#: Pages that are saved before any has been asked for again.
FIRST_CREDIT = 256.0
#: What a loaded page earns, and the most that can be earned ahead.
EARNED, MOST_CREDIT = 16.0, 4096.0
#: Without credit: evictions for each page of a run, and the pages of a run.
EVICTIONS_A_PAGE, RUN_PAGES = 64, 64


class Spill:
    """Keeps evicted pages; see the module.

    Args:
        pages: of the device; told here what they evict.
        host: pages on the host, shared with sequences that were set back.

    Attributes:
        is_on: whether there is room on the host at all.
    """

    def __init__(self, pages: PageAllocator, host: HostPages) -> None:
        self.is_on = host.capacity > 0
        self._host = host
        self._credit = FIRST_CREDIT
        self._stopped = False
        self._saves: list[PageSave] = []  # not in a plan yet
        self._loads: dict[tuple[int, int], int] = {}  # (group, page) → host page, likewise
        if self.is_on:
            pages.watch_evictions(self._on_evict)

    def has(self, group: int, digest: bytes) -> bool:
        """Whether the page of this content is on the host."""
        return self._host.find(group, digest) is not None

    def reserve(self, group: int, digest: bytes) -> int:
        """The host page of this content, which stays there until the next plan is launched."""
        host_page = self._host.use(group, digest)
        self._host.pin(group, host_page)
        return host_page

    def load(self, group: int, host_page: int, page: int) -> None:
        """Has the next plan fill a page of the device with a reserved page of the host."""
        self._credit = min(self._credit + EARNED, MOST_CREDIT)
        self._stopped = False
        self._loads[group, page] = host_page

    def tell(self, plan: Plan) -> None:
        """Moves the saves and loads since the last plan into this one, which is complete."""
        plan.page_saves += self._saves
        plan.page_loads += [
            PageLoad(group=group, host_page=host_page, page=page)
            for (group, page), host_page in self._loads.items()
        ]
        self._saves = []
        self._loads = {}
        self._host.unpin()

    def _on_evict(self, group: int, page: int, digest: bytes) -> None:
        if self._loads.pop((group, page), None) is not None:
            return  # it never held the content; the host still does
        if self._stopped:
            self._credit += 1 / EVICTIONS_A_PAGE
            self._stopped = self._credit < RUN_PAGES
            return
        host_page = self._host.keep(group, digest)
        if host_page is not None:
            self._saves.append(PageSave(group=group, page=page, host_page=host_page))
            self._credit -= 1
            self._stopped = self._credit <= 0
