"""Adapters in the host's memory, ready for a slot: loaded beside the step loop, bounded in bytes.

An adapter is held while a live request uses it, and stays after that until room is needed; the
least recently used one goes first. What is not here is measured in a thread, and once there is room
for it read from the disk and made into arrays there. Owned by the engine's thread; only measuring
and loading are done elsewhere.

Invariants: an adapter that is used is never dropped. No more than `max_bytes` are held or being
loaded: a load for which there is no room waits until something else is not used any more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import InvalidAdapter, JaxserveError

#: Adapters that are read at once.
_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Ready:
    """An adapter that could be put into a slot.

    Attributes:
        rank_class: that it fits.
        arrays: for the device.
        num_bytes: of them.
    """

    rank_class: int
    arrays: Any
    num_bytes: int


#: Reads an adapter's directory: its key and path, to what is held. Raises `InvalidAdapter`.
Load = Callable[[str, Path], Ready]
#: The bytes that an adapter in a directory will have, at most. Raises likewise.
Measure = Callable[[Path], int]


class HostAdapters:
    """See the module.

    Args:
        load, measure: called in a thread.
        largest_bytes: of one adapter's arrays, at most.
        max_bytes: of all; room for one there always is.

    Attributes:
        num_loads: from the disk, so far.
    """

    def __init__(self, load: Load, measure: Measure, *, largest_bytes: int, max_bytes: int) -> None:
        self.num_loads = 0
        self._load, self._measure = load, measure
        self._max_bytes = max(max_bytes, largest_bytes)
        self._pool = ThreadPoolExecutor(_THREADS, "jaxserve adapters")
        self._ready: OrderedDict[str, Ready] = OrderedDict()
        self._users: dict[str, int] = {}
        self._wanted: OrderedDict[str, tuple[Path, Future[int]]] = OrderedDict()  # not begun
        self._loading: dict[str, tuple[int, Future[Ready]]] = {}

    @property
    def num_bytes(self) -> int:
        """Held."""
        return sum(ready.num_bytes for ready in self._ready.values())

    @property
    def is_loading(self) -> bool:
        """Whether something is wanted that is not here yet."""
        return bool(self._wanted or self._loading)

    def use(self, key: str, path: Path, count: int) -> Ready | None:
        """So many sequences use an adapter from now on; None if it has to be loaded first."""
        self._users[key] = self._users.get(key, 0) + count
        ready = self._ready.get(key)
        if ready is not None:
            self._ready.move_to_end(key)
        elif key not in self._loading and key not in self._wanted:
            self._wanted[key] = path, self._pool.submit(self._measure, path)
        return ready

    def leave(self, key: str, count: int = 1) -> None:
        """So many sequences use it no more."""
        self._users[key] -= count
        if not self._users[key]:
            del self._users[key]
            self._wanted.pop(key, None)

    def get(self, key: str) -> Ready:
        """One that is used and ready."""
        return self._ready[key]

    def poll(self) -> dict[str, Ready | JaxserveError]:
        """Begins the loads that there is room for; returns those that have come to an end."""
        ended: dict[str, Ready | JaxserveError] = {}
        for key in [key for key, (_, future) in self._loading.items() if future.done()]:
            _, future = self._loading.pop(key)
            error = _error_of(future)
            if error is None:
                self._ready[key] = future.result()
                self.num_loads += 1
            ended[key] = error or future.result()
        for key, (path, size) in list(self._wanted.items()):
            if not size.done():
                break
            error = _error_of(size)
            if error is not None:
                ended[key] = error
            elif self._make_room(size.result()):
                self._loading[key] = size.result(), self._pool.submit(self._load, key, path)
            else:
                break
            del self._wanted[key]
        return ended

    def close(self) -> None:
        """Waits for no load."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make_room(self, num_bytes: int) -> bool:
        """Room for one more, by dropping what nobody uses."""
        planned = self.num_bytes + sum(size for size, _ in self._loading.values()) + num_bytes
        for key in list(self._ready):
            if planned <= self._max_bytes:
                break
            if key not in self._users:
                planned -= self._ready.pop(key).num_bytes
        return planned <= self._max_bytes


def _error_of(future: Future[Any]) -> JaxserveError | None:
    error = future.exception()
    if error is None or isinstance(error, JaxserveError):
        return error
    return InvalidAdapter(f"the adapter cannot be loaded: {type(error).__name__}: {error}")
