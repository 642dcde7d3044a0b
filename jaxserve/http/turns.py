"""Places to work in, which the smallest of those who wait get next.

Where one who works may take long, and larger work tends to take longer, many who bring large work
do not keep out those who bring little: these go first, and one place is theirs alone.

Invariant: nobody waits while there is a place for him. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools


class Turns:
    """See the module; of equals the first to come is the first to go.

    Args:
        places: how many work at once.
        small: of more than one place, one is left to work of at most this size.
    """

    def __init__(self, places: int = 1, small: int = 0) -> None:
        self._free = places
        self._small = small
        self._kept = 1 if places > 1 else 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    async def acquire(self, size: int) -> None:
        """Returns when it is the caller's turn, which ends with `release`; may be cancelled.

        Args:
            size: of the caller's work, in any unit that all callers use.
        """
        if self._has_place(size):
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        row = (size, next(self._arrivals), turn)
        heapq.heappush(self._waiting, row)
        try:
            await turn
        except asyncio.CancelledError:
            if row in self._waiting:
                self._waiting.remove(row)
                heapq.heapify(self._waiting)
            elif not turn.cancelled():  # it was given in the same moment
                self.release()
            raise

    def release(self) -> None:
        """Lets the next one go."""
        self._free += 1
        while self._waiting and self._has_place(self._waiting[0][0]):
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():  # who is cancelled may not have heard of it yet
                self._free -= 1
                turn.set_result(None)

    def _has_place(self, size: int) -> bool:
        return self._free > (self._kept if size > self._small else 0)
