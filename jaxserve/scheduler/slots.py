"""Row slots of the device, and who holds which.

Slots persist between steps: device state (sampling parameters, last token, page table row) stands
at the slot's index. A launched plan keeps the list of owners as it was, since slots change hands
before its tokens are read.
"""

from __future__ import annotations

import math

from jaxserve.scheduler.accounts import Meter
from jaxserve.scheduler.sequence import Sequence

#: By slot, who holds it. Never changed once a launched plan has it.
Owners = list[Sequence | None]


class SlotTable:
    """Slots 0 … max_rows - 1.

    Args:
        max_rows: how many.
        meter: charges tenants for who takes one.

    Attributes:
        holders: who holds a slot, by level.
    """

    def __init__(self, max_rows: int, meter: Meter) -> None:
        self.holders: dict[int, dict[Sequence, None]] = {}
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
        self.holders.setdefault(sequence.level, {})[sequence] = None
        self._meter.admit(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence's slot is free; launched plans still know it as the owner."""
        self._free.append(sequence.slot)
        holders = self.holders[sequence.level]
        del holders[sequence]
        if not holders:
            del self.holders[sequence.level]
        self._meter.leave(sequence)
