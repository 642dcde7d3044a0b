"""How often, and after what pause, an engine is started again (`http.lives`, `http.follower`).

An engine that said in one sentence why it cannot start (a wrong setting, a missing file) would say
it again: that ends `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque

#: Status of an engine that has said on stderr why it could not start.
EXIT_TOLD = 1
#: An engine that lived this long is started again at once.
_LONG_LIFE_S = 60.0
_LONGEST_PAUSE_S = 30.0


def may_restart(status: int) -> bool:
    """Whether an engine that ended with this status is started again.

    Not if it was told to end (0), or has told why it cannot start.
    """
    return status not in (0, EXIT_TOLD)


def describe_end(status: int) -> str:
    """How an engine process ended."""
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the engine process ended {how}"


class Budget:
    """So many restarts within so long a time.

    Args:
        max_restarts: of which one more ends it.
        window_s: restarts before that are forgotten.
    """

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._at_s: deque[float] = deque()

    def spend(self) -> bool:
        """Whether there is one more restart, which is counted then."""
        now_s = time.monotonic()
        while self._at_s and now_s - self._at_s[0] > self._window_s:
            self._at_s.popleft()
        if len(self._at_s) >= self._max_restarts:
            return False
        self._at_s.append(now_s)
        return True

    def __str__(self) -> str:
        return (
            f"it was started again {len(self._at_s)} times within {self._window_s:g} s, and "
            f"engine.max_restarts={self._max_restarts}"
        )


class Backoff:
    """Pauses between lives: none, then some, doubled up to half a minute while lives are short.

    Args:
        first_pause_s: before the second restart in a row.
    """

    def __init__(self, first_pause_s: float) -> None:
        self._first_pause_s = first_pause_s
        self._pause_s = 0.0
        self._started_s = time.monotonic()

    def started(self) -> None:
        """A life begins."""
        self._started_s = time.monotonic()

    def next_pause_s(self) -> float:
        """A life has ended: how long to wait before the next."""
        if time.monotonic() - self._started_s > _LONG_LIFE_S:
            self._pause_s = 0.0
        pause_s = self._pause_s
        self._pause_s = min(_LONGEST_PAUSE_S, max(self._first_pause_s, 2 * pause_s))
        return pause_s


async def waited(stopping: asyncio.Event, pause_s: float) -> bool:
    """Waits so long, or until `stopping` is set: returns whether it is."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), pause_s)
    return stopping.is_set()


async def ended(pid: int) -> None:
    """Waits for the end of a child, without reaping it."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()
    fd = os.pidfd_open(pid)
    loop.add_reader(fd, lambda: end.done() or end.set_result(None))
    try:
        await end
    finally:
        loop.remove_reader(fd)
        os.close(fd)
