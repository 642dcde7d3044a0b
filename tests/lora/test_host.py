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

    def measure(self, path: Path) -> int:
        """All are alike, but for one that its directory names."""
        return int(path.name) if path.name.isdigit() else SIZE

    def load(self, key: str, path: Path) -> Ready:
        """Waits for the gate."""
        assert self.gate.acquire(timeout=30)
        if key == "broken":
            raise InvalidAdapter("it is broken")
        self.loaded.append(key)
        return Ready(rank_class=0, arrays=path.name, num_bytes=self.measure(path))


def poll_until(host: HostAdapters, begun: int) -> None:
    """Polls until so many loads have been begun; none ends meanwhile."""
    while len(host._loading) < begun:
        assert host.poll() == {}


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
    host = HostAdapters(disk.load, disk.measure, largest_bytes=SIZE, max_bytes=2 * SIZE)
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
    host = HostAdapters(disk.load, disk.measure, largest_bytes=SIZE, max_bytes=SIZE)
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
    host = HostAdapters(disk.load, disk.measure, largest_bytes=SIZE, max_bytes=SIZE)
    host.use("a", Path("/a"), 1)
    host.use("b", Path("/b"), 1)
    poll_until(host, 1)
    host.leave("b")
    disk.gate.release()
    assert await_end(host) == {"a": "a"}
    assert not host.is_loading and disk.loaded == ["a"]
    host.close()


def test_what_is_small_takes_little_room() -> None:
    """Whatever the largest adapter would take: only what is needed has to give way."""
    disk = Disk()
    host = HostAdapters(disk.load, disk.measure, largest_bytes=100, max_bytes=100)
    for key in ("30", "40", "31"):
        host.use(key, Path(f"/{key}"), 1)
    poll_until(host, 2)  # beside each other; there is no room for the third
    disk.gate.release(2)
    ended = await_end(host)
    while len(ended) < 2:
        ended |= await_end(host)
    assert set(ended) == {"30", "40"} and host.num_bytes == 70
    host.leave("40")
    disk.gate.release()
    assert await_end(host) == {"31": "31"}
    assert host.num_bytes == 61 and host.use("30", Path("/30"), 1) is not None
    host.close()


def test_one_that_cannot_be_measured() -> None:
    """Is as one that cannot be loaded."""

    def broken(path: Path) -> int:
        raise InvalidAdapter("it is broken") if path.name == "x" else OSError("no disk")

    host = HostAdapters(Disk().load, broken, largest_bytes=SIZE, max_bytes=SIZE)
    for name in "xy":
        assert host.use(name, Path(f"/{name}"), 1) is None
        assert await_end(host) == {name: "InvalidAdapter"}
        host.leave(name)
    assert not host.is_loading
    host.close()
