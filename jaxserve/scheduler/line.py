"""A tenant's waiting sequences at one level, in order of arrival.

Most come in order and go from the front; some come back to an older place (preempted ones, choices
whose prompt is computed). The former stand in a deque, the latter in a small heap.

Invariants: adding and taking the first cost O(log n) at worst, removing O(1); entries of sequences
that were removed are skipped, and dropped before they outnumber the rest.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque

from jaxserve.scheduler.sequence import Sequence


class Line:
    """See the module.

    Attributes:
        num_passed: how often the first has been passed over since it became the first.
        nearest: with locality, what the queue found near the front, until somebody comes or goes:
            (plan, (cached tokens, sequence)).
    """

    __slots__ = ("_back", "_fresh", "_members", "_stamp", "nearest", "num_passed")

    def __init__(self) -> None:
        self.num_passed = 0
        self.nearest: tuple[int, tuple[int, Sequence]] | None = None
        self._fresh: deque[tuple[int, int, Sequence]] = deque()  # (arrival, stamp, sequence)
        self._back: list[tuple[int, int, Sequence]] = []
        self._members: dict[Sequence, int] = {}
        self._stamp = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(self, sequence: Sequence) -> None:
        """A sequence that does not stand here takes its place."""
        self.nearest = None
        self._stamp += 1
        self._members[sequence] = self._stamp
        entry = (sequence.arrival, self._stamp, sequence)
        if not self._fresh or sequence.arrival > self._fresh[-1][0]:
            self._fresh.append(entry)
        else:
            heapq.heappush(self._back, entry)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves, wherever it stands."""
        self.nearest = None
        del self._members[sequence]
        num_entries = len(self._fresh) + len(self._back)
        if num_entries > 64 and num_entries > 2 * len(self._members):
            self._fresh = deque(entry for entry in self._fresh if self._is_live(entry))
            self._back = [entry for entry in self._back if self._is_live(entry)]
            heapq.heapify(self._back)

    def first(self) -> Sequence:
        """Who came first; there must be somebody."""
        fresh, back = self._fresh, self._back
        while fresh and not self._is_live(fresh[0]):
            fresh.popleft()
        while back and not self._is_live(back[0]):
            heapq.heappop(back)
        if not back or (fresh and fresh[0] < back[0]):
            return fresh[0][-1]
        return back[0][-1]

    def front(self, limit: int) -> list[Sequence]:
        """The first, and then others that are near the front, at most `limit`."""
        first, members = self.first(), self._members
        found = [first]
        for entries in (self._back, self._fresh) if self._back else (self._fresh,):
            for _, stamp, sequence in entries:
                if len(found) == limit:
                    return found
                if sequence is not first and members.get(sequence) == stamp:
                    found.append(sequence)
        return found

    def last_unbegun(self, look_at: int = 16) -> Sequence | None:
        """Among the last few to arrive, the last one whose request has never run."""
        fresh = self._fresh
        while fresh and not self._is_live(fresh[-1]):
            fresh.pop()
        for entry in itertools.islice(reversed(fresh), look_at):
            if self._is_live(entry) and not entry[-1].has_begun:
                return entry[-1]
        return None

    def _is_live(self, entry: tuple[int, int, Sequence]) -> bool:
        return self._members.get(entry[-1]) == entry[1]
