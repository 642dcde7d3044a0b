"""How much memory there is: on an accelerator, or on the host inside its container's limits.

Read at start-up, before the page pool is sized. The file system's root is a parameter, so that
tests bring their own /proc and /sys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jax

from jaxserve.errors import ConfigError

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one device, or of the host.

    Attributes:
        total_bytes: all that this process could ever have; the same at every start.
        free_bytes: what it may still allocate now.
    """

    total_bytes: int
    free_bytes: int

    def less(self, num_bytes: int) -> Memory:
        """As if so much more were in use."""
        free_bytes = max(0, self.free_bytes - num_bytes)
        return Memory(total_bytes=self.total_bytes, free_bytes=free_bytes)


def memory_of(device: jax.Device) -> Memory:  # pyright: ignore[reportInvalidTypeForm]
    """Memory of a device; the host's for the CPU.

    Raises:
        ConfigError: it cannot be told.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError(f"{device} does not tell its memory: set cache.memory_bytes")
    total = stats["bytes_limit"]
    return Memory(total_bytes=total, free_bytes=total - stats["bytes_in_use"])


def least_memory(devices: Sequence[jax.Device]) -> Memory:  # pyright: ignore[reportInvalidTypeForm]
    """What each of these devices has at least; CPU devices share the host's.

    Raises:
        ConfigError: it cannot be told.
    """
    if devices[0].platform == "cpu":
        host = host_memory()
        return Memory(
            total_bytes=host.total_bytes // len(devices),
            free_bytes=host.free_bytes // len(devices),
        )
    return min(map(memory_of, devices), key=lambda memory: memory.free_bytes)


def host_memory(root: Path = Path("/")) -> Memory:
    """The machine's memory, as far as every cgroup above this process lets it have it.

    Raises:
        ConfigError: /proc/meminfo does not tell.
    """
    limits = [*_cgroup(root, ""), *_cgroup(root, "memory")]
    totals = [_meminfo(root, "MemTotal"), *(limit for limit, _ in limits)]
    free = [_meminfo(root, "MemAvailable"), *(left for _, left in limits)]
    return Memory(total_bytes=min(totals), free_bytes=max(0, min(free)))


def _meminfo(root: Path, wanted: str) -> int:
    path = root / "proc/meminfo"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}; set cache.memory_bytes") from error
    for line in lines:
        name, _, value = line.partition(":")
        if name == wanted:
            return int(value.split()[0]) * 1024
    raise ConfigError(f"{path} has no {wanted}: set cache.memory_bytes")


def _cgroup(root: Path, controller: str) -> list[tuple[int, int]]:
    """Limit and rest of each cgroup from ours up to the root; droppable caches count as rest.

    Args:
        controller: whose hierarchy; v2's where it is empty.
    """
    group = _own_cgroup(root, controller)
    if group is None:
        return []
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_name, used_name, droppable = (
        names if controller else ("memory.max", "memory.current", "inactive_file")
    )
    left = []
    base = root / "sys/fs/cgroup" / controller
    for path in (group, *group.parents):
        folder = base / path.relative_to("/")
        limit = _read_int(folder / limit_name)
        used = _read_int(folder / used_name)
        if limit is not None and used is not None:
            left.append((limit, limit - used + _statistic(folder, droppable)))
    return left


def _own_cgroup(root: Path, controller: str) -> PurePosixPath | None:
    """This process's cgroup in the hierarchy of a controller; v2's where it is empty."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # In a cgroup namespace the path may point above the root that is mounted here.
            return PurePosixPath("/") if "/.." in path else PurePosixPath(path)
    return None


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _statistic(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
