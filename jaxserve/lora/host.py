"""Adapters in the host's memory, ready for a slot: loaded beside the step loop, bounded in bytes.

An adapter is held while a live request uses it, and stays after that until room is needed; the
least recently used one goes first. What is not here is read from the disk in a thread, and made
into arrays there. Owned by the engine's thread; only loading is done elsewhere.

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


class HostAdapters:
    """See the module.

    Args:
        load: called in a thread.
        largest_bytes: of one adapter's arrays, at most.
        max_bytes: of all.

    Attributes:
        num_loads: from the disk, so far.
    """

    def __init__(self, load: Load, *, largest_bytes: int, max_bytes: int) -> None:
        self.num_loads = 0
        self._load = load
        self._largest_bytes = largest_bytes
        self._max_bytes = max(max_bytes, largest_bytes)
        self._pool = ThreadPoolExecutor(_THREADS, "jaxserve adapters")
        self._ready: OrderedDict[str, Ready] = OrderedDict()
        self._users: dict[str, int] = {}
        self._wanted: OrderedDict[str, Path] = OrderedDict()  # not begun
        self._loading: dict[str, Future[Ready]] = {}

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
        elif key not in self._loading:
            self._wanted.setdefault(key, path)
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
        for key in [key for key, future in self._loading.items() if future.done()]:
            future = self._loading.pop(key)
            error = future.exception()
            if error is None:
                self._ready[key] = ended[key] = future.result()
                self.num_loads += 1
            elif isinstance(error, JaxserveError):
                ended[key] = error
            else:
                ended[key] = InvalidAdapter(
                    f"the adapter cannot be loaded: {type(error).__name__}: {error}"
                )
        while self._wanted and self._make_room():
            key, path = self._wanted.popitem(last=False)
            self._loading[key] = self._pool.submit(self._load, key, path)
        return ended

    def close(self) -> None:
        """Waits for no load."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make_room(self) -> bool:
        """Room for one more, by dropping what nobody uses."""
        planned = self.num_bytes + (len(self._loading) + 1) * self._largest_bytes
        for key in list(self._ready):
            if planned <= self._max_bytes:
                break
            if key not in self._users:
                planned -= self._ready.pop(key).num_bytes
        return planned <= self._max_bytes
