"""How much memory is free: on an accelerator, or on the host inside its container's limits.

Read at start-up, before the page pool is sized. The file system's root is a parameter, so that
tests bring their own /proc and /sys.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import jax

MEBIBYTE = 1024 * 1024


def free_bytes(device: jax.Device) -> int:
    """Bytes that may still be allocated on a device."""
    if device.platform == "cpu":
        return free_host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise RuntimeError(f"{device} does not tell its memory: set cache.memory_bytes")
    return stats["bytes_limit"] - stats["bytes_in_use"]


def free_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may still allocate: the machine's, and every cgroup's above it."""
    limits = [_available(root / "proc/meminfo"), *_cgroup_v2(root), *_cgroup_v1(root)]
    return max(0, min(limits))


def _available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{meminfo} has no MemAvailable: set cache.memory_bytes")


def _cgroup_v2(root: Path) -> list[int]:
    """What is left in each cgroup from ours up to the root; caches that can be dropped are left."""
    group = _own_cgroup(root, "")
    if group is None:
        return []
    left = []
    base = root / "sys/fs/cgroup"
    for path in (group, *group.parents):
        folder = base / path.relative_to("/")
        limit = _read_int(folder / "memory.max")
        used = _read_int(folder / "memory.current")
        if limit is not None and used is not None:
            left.append(limit - used + _statistic(folder, "inactive_file"))
    return left


def _cgroup_v1(root: Path) -> list[int]:
    group = _own_cgroup(root, "memory")
    if group is None:
        return []
    left = []
    base = root / "sys/fs/cgroup/memory"
    for path in (group, *group.parents):
        folder = base / path.relative_to("/")
        limit = _read_int(folder / "memory.limit_in_bytes")
        used = _read_int(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left.append(limit - used + _statistic(folder, "total_inactive_file"))
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
