"""How much memory there is, read from planted /proc and /sys trees and from stub devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.device.memory import MEBIBYTE, Memory, host_memory, memory_of
from jaxserve.errors import ConfigError

GIB = 1024 * MEBIBYTE
#: Limit of a cgroup v1 that has none.
UNLIMITED_V1 = 9223372036854771712


class Machine:
    """A root directory with 16 GiB of memory, 12 of them available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", meminfo(16, 12))

    def write(self, path: str, text: object) -> None:
        """Writes a file, with its folders."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def belongs_to(self, *lines: str) -> None:
        """Sets this process's cgroups."""
        self.write("proc/self/cgroup", "\n".join(lines))

    def group_v2(self, path: str, limit: object, used: int, stat: str = "") -> None:
        """A cgroup of the unified hierarchy."""
        self.write(f"sys/fs/cgroup{path}/memory.max", limit)
        self.write(f"sys/fs/cgroup{path}/memory.current", used)
        if stat:
            self.write(f"sys/fs/cgroup{path}/memory.stat", stat)

    def group_v1(self, path: str, limit: int, used: int, stat: str = "") -> None:
        """A cgroup of the memory controller's own hierarchy."""
        self.write(f"sys/fs/cgroup/memory{path}/memory.limit_in_bytes", limit)
        self.write(f"sys/fs/cgroup/memory{path}/memory.usage_in_bytes", used)
        if stat:
            self.write(f"sys/fs/cgroup/memory{path}/memory.stat", stat)

    def memory(self) -> tuple[int, int]:
        """What is read: total and free bytes."""
        memory = host_memory(self.root)
        return memory.total_bytes, memory.free_bytes


def meminfo(total_gib: int, available_gib: int) -> str:
    """As the kernel writes it."""
    kib = 1024 * 1024
    lines = {"MemTotal": total_gib * kib, "MemFree": kib, "MemAvailable": available_gib * kib}
    return "\n".join(f"{name}:{value:>16} kB" for name, value in lines.items())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Without any cgroup."""
    return Machine(tmp_path)


def test_without_cgroups_it_is_the_machines(machine: Machine) -> None:
    assert machine.memory() == (16 * GIB, 12 * GIB)


def test_a_v2_cgroup_limits_both_numbers(machine: Machine) -> None:
    machine.belongs_to("0::/job")
    machine.group_v2("/job", 8 * GIB, 3 * GIB)
    assert machine.memory() == (8 * GIB, 5 * GIB)


def test_the_machine_limits_a_cgroup_that_may_have_more(machine: Machine) -> None:
    machine.belongs_to("0::/job")
    machine.group_v2("/job", 64 * GIB, 3 * GIB)
    assert machine.memory() == (16 * GIB, 12 * GIB)


def test_every_v2_cgroup_above_counts(machine: Machine) -> None:
    """The tightest limit and the smallest rest may be of different groups."""
    machine.belongs_to("0::/pod/box/job")
    machine.group_v2("/pod", 10 * GIB, 9 * GIB)
    machine.group_v2("/pod/box", 6 * GIB, 2 * GIB)
    machine.group_v2("/pod/box/job", "max", GIB)
    assert machine.memory() == (6 * GIB, GIB)


def test_max_is_no_limit(machine: Machine) -> None:
    machine.belongs_to("0::/job")
    machine.group_v2("/job", "max", 3 * GIB)
    assert machine.memory() == (16 * GIB, 12 * GIB)


@pytest.mark.parametrize("path", ["/", "/../elsewhere", "/docker/0123"])
def test_a_containers_own_root_limits_whatever_path_is_told(machine: Machine, path: str) -> None:
    """With a namespace of its own, outside it, and with the host's paths."""
    machine.belongs_to(f"0::{path}")
    machine.group_v2("", 4 * GIB, GIB)
    machine.group_v2("/../elsewhere", GIB, 0)  # not a cgroup of ours
    assert machine.memory() == (4 * GIB, 3 * GIB)


def test_caches_that_can_be_dropped_count_as_free(machine: Machine) -> None:
    machine.belongs_to("0::/job")
    stat = f"anon {GIB}\nfile {6 * GIB}\nactive_file {4 * GIB}\ninactive_file {2 * GIB}"
    machine.group_v2("/job", 8 * GIB, 7 * GIB, stat)
    assert machine.memory() == (8 * GIB, 3 * GIB)


def test_a_cgroup_above_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.belongs_to("0::/job")
    machine.group_v2("/job", 2 * GIB, 3 * GIB)
    assert machine.memory() == (2 * GIB, 0)


def test_v1_cgroups(machine: Machine) -> None:
    machine.belongs_to(
        "12:cpuset:/other", "5:cpu,memory:/pod/job", "1:name=systemd:/x", "0::/unused"
    )
    machine.group_v1("", UNLIMITED_V1, 9 * GIB)
    machine.group_v1("/pod", 8 * GIB, 6 * GIB, f"inactive_file 5\ntotal_inactive_file {GIB}")
    machine.group_v1("/pod/job", UNLIMITED_V1, GIB)
    machine.group_v1("/other", GIB, 0)
    assert machine.memory() == (8 * GIB, 3 * GIB)


def test_missing_files_limit_nothing(machine: Machine) -> None:
    machine.belongs_to("5:memory:/gone", "0::/gone")
    assert machine.memory() == (16 * GIB, 12 * GIB)
    machine.write("sys/fs/cgroup/gone/memory.max", GIB)  # without memory.current
    assert machine.memory() == (16 * GIB, 12 * GIB)


def test_no_meminfo_is_said_with_the_remedy(machine: Machine) -> None:
    machine.write("proc/meminfo", "MemTotal: 5 kB")
    with pytest.raises(ConfigError, match=r"no MemAvailable: set cache\.memory_bytes"):
        host_memory(machine.root)
    (machine.root / "proc/meminfo").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*meminfo.*set cache\.memory_bytes"):
        host_memory(machine.root)


def test_this_machines_memory_is_read() -> None:
    memory = host_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes


def test_less() -> None:
    memory = Memory(total_bytes=100, free_bytes=60)
    assert memory.less(25) == Memory(total_bytes=100, free_bytes=35)
    assert memory.less(61) == Memory(total_bytes=100, free_bytes=0)


class Device:
    """A stub of a JAX device."""

    def __init__(self, platform: str, stats: dict[str, int] | None) -> None:
        self.platform = platform
        self._stats = stats

    def __str__(self) -> str:
        return f"{self.platform}:0"

    def memory_stats(self) -> dict[str, int] | None:
        """What the backend tells."""
        return self._stats


def test_an_accelerator_tells_its_memory() -> None:
    device = Device("tpu", {"bytes_limit": 16 * GIB, "bytes_in_use": 5 * GIB})
    assert memory_of(device) == Memory(total_bytes=16 * GIB, free_bytes=11 * GIB)


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 5}])
def test_an_accelerator_that_does_not_tell(stats: dict[str, int] | None) -> None:
    with pytest.raises(ConfigError, match=r"gpu:0 does not tell .*set cache\.memory_bytes"):
        memory_of(Device("gpu", stats))


def test_the_cpu_has_the_hosts_memory() -> None:
    total = memory_of(Device("cpu", {"bytes_limit": 1, "bytes_in_use": 0})).total_bytes
    assert total == host_memory().total_bytes > GIB // 4
