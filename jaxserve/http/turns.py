"""A lock that the smallest of those who wait gets next.

Where one who holds it may take long, and larger work tends to take longer, many who bring large
work do not keep out those who bring little.

Invariant: nobody waits while nobody has it. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools


class Turns:
    """See the module; of equals the first to come is the first to go."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    async def acquire(self, size: int) -> None:
        """Returns when it is the caller's turn, which ends with `release`; may be cancelled.

        Args:
            size: of the caller's work, in any unit that all callers use.
        """
        if not self._taken:
            self._taken = True
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
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():  # who is cancelled may not have heard of it yet
                turn.set_result(None)
                return
        self._taken = False
