"""Pages for the decoding rows that come to a new one in the next plan, taken while there is time.

Which rows these are is known when the step before is read (`scheduler.decoding`), and the device
works then. The next plan that is launched tells their entries. A page that is taken ahead is the
row's like any other: whoever loses its slot in the meantime gives it back with the rest, and its
entry is not told.

Invariants: pages are taken ahead for all of these rows or for none, and only free ones: nobody is
set back for it. A row that lost its slot does not get one again before a plan is launched, so that
the entries of those that are still there are as they were.
"""

from __future__ import annotations

from jaxserve.scheduler.decoding import DecodeSet
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.plan import PageEntry, Plan
from jaxserve.scheduler.sequence import Sequence, SequenceState


class OpenedAhead:
    """Rows whose next page was taken ahead, until a plan tells it; see the module.

    Args:
        decoding: the rows.
        pages: where theirs come from.
    """

    def __init__(self, decoding: DecodeSet, pages: PageAllocator) -> None:
        self._decoding = decoding
        self._pages = pages
        self._rows: dict[Sequence, int] = {}  # with the position that opens the page
        self._entries: list[PageEntry] = []

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._rows

    @property
    def num_decoding(self) -> int:
        """Of these rows, those that still decode."""
        return sum(sequence in self._decoding for sequence in self._rows)

    def open(self) -> None:
        """Takes the pages that the next decode step opens, if so many are free."""
        if self._rows:
            return  # no plan was launched since
        opening = self._decoding.opening(1)
        entries = self._pages.open_each(opening)
        if entries is not None:
            self._rows, self._entries = dict(opening), entries

    def tell(self, plan: Plan) -> None:
        """Moves the entries into a plan that is complete."""
        if all(sequence in self._decoding for sequence in self._rows):
            plan.page_entries += self._entries
        else:
            plan.page_entries += [
                (group, sequence.slot, position // self._pages.page_size, page)
                for sequence, position in self._rows.items()
                if sequence.state in (SequenceState.DECODING, SequenceState.DRAFTING)
                for group, page in enumerate(self._pages.at(sequence.table, position))
            ]
        self._rows, self._entries = {}, []
