"""The waiting queue: sequences that do not run, best first by (priority, arrival).

Invariants: pushing and popping cost O(log n), removing O(1), whatever waits. A preempted sequence
that is pushed again stands before all that arrived after it.
"""

from __future__ import annotations

import heapq

from jaxserve.scheduler.sequence import Sequence


class WaitingQueue:
    """A heap whose removed entries are dropped when they come to the top, or outnumber the rest."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Sequence]] = []
        self._entries: dict[Sequence, int] = {}  # live sequence → number of its heap entry
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._entries

    def push(self, sequence: Sequence) -> None:
        """Adds a sequence that is not in the queue."""
        assert sequence not in self._entries
        self._pushed += 1
        self._entries[sequence] = self._pushed
        heapq.heappush(self._heap, (*sequence.rank, self._pushed, sequence))

    def peek(self) -> Sequence | None:
        """The best sequence, left in the queue; None if nobody waits."""
        self._drop_removed()
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Sequence:
        """Takes the best sequence out."""
        self._drop_removed()
        sequence = heapq.heappop(self._heap)[-1]
        del self._entries[sequence]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        del self._entries[sequence]
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._entries):
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def _drop_removed(self) -> None:
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)

    def _is_live(self, entry: tuple[int, int, int, Sequence]) -> bool:
        return self._entries.get(entry[-1]) == entry[2]
