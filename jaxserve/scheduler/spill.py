"""Cached pages that the device had to give up, kept in the host's memory.

    cached on the device ──evicted──▶ kept on the host ──found──▶ loaded into a page of the device
                                             │
                                             └── room is needed: least recently used first

A page that is evicted in the middle of a plan is saved by that plan, before anything else of it
writes. One that is found there is loaded by the plan that gives it to a sequence, before its step
reads. What is loaded stays on the host too, so that it need not be saved again.

Sequences that were set back come first: their pages take the place of kept ones.

Invariants: a host page that a plan loads is not written by the same plan's saves (it is pinned
until the plan is launched). A page of the device that is given up before its load was launched is
neither loaded nor saved.
"""

from __future__ import annotations

from jaxserve.scheduler.host_pages import HostPages
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.plan import PageLoad, PageSave, Plan


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
        host_page = self._host.keep(group, digest)
        if host_page is not None:
            self._saves.append(PageSave(group=group, page=page, host_page=host_page))
