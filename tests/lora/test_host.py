"""Adapters in the host's memory: loaded beside the loop, bounded, never dropped while used."""

from __future__ import annotations

import threading
from pathlib import Path

from jaxserve.errors import InvalidAdapter
from jaxserve.lora.host import HostAdapters, Ready

SIZE = 10


class Disk:
    """Loads when it is told to."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.loaded: list[str] = []

    def load(self, key: str, path: Path) -> Ready:
        """Waits for the gate."""
        assert self.gate.acquire(timeout=30)
        if key == "broken":
            raise InvalidAdapter("it is broken")
        self.loaded.append(key)
        return Ready(rank_class=0, arrays=path.name, num_bytes=SIZE)


def await_end(host: HostAdapters) -> dict[str, object]:
    """Polls until something has ended."""
    while True:
        ended = host.poll()
        if ended:
            return {
                k: type(e).__name__ if isinstance(e, Exception) else e.arrays
                for k, e in ended.items()
            }


def test_bounds_and_order() -> None:
    """Room for two: the third waits until one is not used any more; least recently used goes."""
    disk = Disk()
    host = HostAdapters(disk.load, largest_bytes=SIZE, max_bytes=2 * SIZE)
    for key in "abc":
        assert host.use(key, Path(f"/{key}"), 2) is None
    assert host.is_loading
    assert host.poll() == {}
    disk.gate.release(2)
    ended = await_end(host)
    while len(ended) < 2:
        ended |= await_end(host)
    assert ended == {"a": "a", "b": "b"}
    assert host.poll() == {}  # c has no room
    assert host.is_loading and host.num_bytes == 2 * SIZE
    host.leave("a", 1)
    assert host.poll() == {}
    host.leave("a", 1)
    assert host.poll() == {}
    disk.gate.release()
    assert await_end(host) == {"c": "c"}
    assert host.num_bytes == 2 * SIZE and host.num_loads == 3
    assert host.get("b").arrays == "b"
    assert host.use("b", Path("/b"), 1) is not None
    host.close()


def test_a_failed_load_can_be_tried_again() -> None:
    """Its error goes to those that wait for it."""
    disk = Disk()
    host = HostAdapters(disk.load, largest_bytes=SIZE, max_bytes=SIZE)
    for _ in range(2):
        assert host.use("broken", Path("/x"), 1) is None
        host.poll()
        disk.gate.release()
        assert await_end(host) == {"broken": "InvalidAdapter"}
        host.leave("broken")
        assert not host.is_loading
    assert host.num_bytes == 0
    host.close()


def test_what_nobody_waits_for_is_not_loaded() -> None:
    """Its requests were cancelled before its turn came."""
    disk = Disk()
    host = HostAdapters(disk.load, largest_bytes=SIZE, max_bytes=SIZE)
    host.use("a", Path("/a"), 1)
    host.use("b", Path("/b"), 1)
    host.poll()
    host.leave("b")
    disk.gate.release()
    assert await_end(host) == {"a": "a"}
    assert not host.is_loading and disk.loaded == ["a"]
    host.close()
