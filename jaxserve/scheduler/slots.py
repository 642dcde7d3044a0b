"""Row slots of the device, and who holds which.

Slots persist between steps: device state (sampling parameters, last token, page table row) stands
at the slot's index. A launched plan keeps the list of owners as it was, since slots change hands
before its tokens are read.
"""

from __future__ import annotations

from jaxserve.scheduler.sequence import Sequence

#: By slot, who holds it. Never changed once a launched plan has it.
Owners = list[Sequence | None]


class SlotTable:
    """Slots 0 … max_rows - 1."""

    def __init__(self, max_rows: int) -> None:
        self._free = list(range(max_rows - 1, -1, -1))
        self._owners: Owners = [None] * max_rows
        self._is_shared = False

    @property
    def num_free(self) -> int:
        """Slots that can be taken now."""
        return len(self._free)

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

    def leave(self, sequence: Sequence) -> None:
        """The sequence's slot is free; launched plans still know it as the owner."""
        self._free.append(sequence.slot)
