"""Row slots of the device, and who holds which.

Slots persist between steps: device state (sampling parameters, last token, page table row) stands
at the slot's index. A launched plan keeps the list of owners as it was, since slots change hands
before its tokens are read.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Set

from jaxserve.scheduler.accounts import Meter
from jaxserve.scheduler.sequence import Sequence

#: By slot, who holds it. Never changed once a launched plan has it.
Owners = list[Sequence | None]


class Holders:
    """Who holds a slot at one level, by arrival.

    Kept in order, since who came last is asked for at each preemption, and sorting all rows would
    take longer than the rest of a plan.
    """

    __slots__ = ("_arrivals", "_sequences")

    def __init__(self) -> None:
        self._arrivals: list[int] = []
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._arrivals)

    def last_first(self) -> Iterator[Sequence]:
        """All of them, who came last first."""
        return map(self._sequences.__getitem__, reversed(self._arrivals))

    def add(self, sequence: Sequence) -> None:
        """A sequence that is not among them joins."""
        bisect.insort(self._arrivals, sequence.arrival)
        self._sequences[sequence.arrival] = sequence

    def remove(self, sequence: Sequence) -> None:
        """One of them leaves."""
        del self._sequences[sequence.arrival]
        del self._arrivals[bisect.bisect_left(self._arrivals, sequence.arrival)]


class SlotTable:
    """Slots 0 … max_rows - 1.

    Args:
        max_rows: how many.
        meter: charges tenants for who takes one.

    Attributes:
        holders: who holds a slot, by level; none that is empty.
    """

    def __init__(self, max_rows: int, meter: Meter) -> None:
        self.holders: dict[int, Holders] = {}
        self._meter = meter
        self._free = list(range(max_rows - 1, -1, -1))
        self._owners: Owners = [None] * max_rows
        self._is_shared = False

    @property
    def num_free(self) -> int:
        """Slots that can be taken now."""
        return len(self._free)

    @property
    def num_taken(self) -> int:
        """Slots that somebody holds."""
        return len(self._owners) - len(self._free)

    @property
    def worst_level(self) -> float:
        """Of those that hold a slot; better than any if nobody does."""
        return max(self.holders, default=-math.inf)

    def owner(self, slot: int) -> Sequence:
        """Who took the slot last."""
        owner = self._owners[slot]
        assert owner is not None, f"nobody took slot {slot}"
        return owner

    def worst_first(self, exempt: Set[Sequence], *, above: float = -math.inf) -> Iterator[Sequence]:
        """Who holds a slot, the worst level first, and within it who came last.

        Args:
            exempt: not these.
            above: only of levels worse than this.
        """
        for level in sorted((level for level in self.holders if level > above), reverse=True):
            yield from (s for s in self.holders[level].last_first() if s not in exempt)

    def owners(self) -> Owners:
        """The owners as of now, for a launched plan to keep."""
        self._is_shared = True
        return self._owners

    def take(self, sequence: Sequence) -> None:
        """Gives a sequence a free slot. The caller has looked at `num_free`."""
        if self._is_shared:
            self._owners = list(self._owners)
            self._is_shared = False
        sequence.slot = self._free.pop()
        self._owners[sequence.slot] = sequence
        holders = self.holders.get(sequence.level)
        if holders is None:
            holders = self.holders[sequence.level] = Holders()
        holders.add(sequence)
        self._meter.admit(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence's slot is free; launched plans still know it as the owner."""
        self._free.append(sequence.slot)
        holders = self.holders[sequence.level]
        holders.remove(sequence)
        if not holders:
            del self.holders[sequence.level]
        self._meter.leave(sequence)
