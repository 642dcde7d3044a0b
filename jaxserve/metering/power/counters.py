"""Energy counters of the machine: of GPUs through NVML, of CPUs through RAPL.

A counter says how many joules were taken since some moment. It may wrap around, begin anew, fail,
or say what is no number; `Counter` makes what was added since the reading before of it, or nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")


class Counter:
    """One counter.

    Args:
        name: in logs and metrics.
        read_j: its value; raises OSError where it cannot be read.
        wrap_j: at which it begins again from 0; None if it does not.
    """

    def __init__(self, name: str, read_j: Callable[[], float], wrap_j: float | None = None) -> None:
        self.name = name
        self._read_j = read_j
        self._wrap_j = wrap_j
        self._last_j: float | None = None

    def added_j(self) -> float | None:
        """Joules since the last call; None at the first, and where they are not known."""
        try:
            value_j = float(self._read_j())
        except (OSError, ValueError):
            value_j = math.nan
        last_j = self._last_j
        if not math.isfinite(value_j) or value_j < 0:
            self._last_j = None
            return None
        self._last_j = value_j
        if last_j is None:
            return None
        if value_j >= last_j:
            return value_j - last_j
        if self._wrap_j is not None and last_j > self._wrap_j / 2:
            return value_j + self._wrap_j - last_j
        return None  # it was reset


def rapl_counters(root: Path = POWERCAP) -> list[Counter]:
    """Of the processor packages, where they may be read (usually by root alone)."""
    found = []
    for path in sorted(root.glob("intel-rapl:*")):
        if path.name.count(":") != 1:
            continue  # a part of a package
        try:
            int((path / "energy_uj").read_text())
            wrap_j = int((path / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError):
            continue
        found.append(Counter(path.name, lambda path=path: _micro(path / "energy_uj"), wrap_j))
    return found


def nvml_counters(gpus: Sequence[int] = ()) -> list[Counter]:
    """Of NVIDIA's GPUs (Volta and newer); none where there are none.

    Args:
        gpus: indexes of those that are meant; all where empty.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # no package, no driver, no device: each has errors of its own
        logger.debug("NVML: %s", error)
        return []
    found = []
    for index in gpus or range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError as error:
            logger.debug("NVML, GPU %d: %s", index, error)
            continue

        def read_j(handle: object = handle) -> float:
            try:
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            except pynvml.NVMLError as error:
                raise OSError(str(error)) from error

        found.append(Counter(f"nvml:{index}", read_j))
    return found


def total_added_j(counters: Iterable[Counter]) -> float | None:
    """What all counters added; None if any does not know."""
    added = [counter.added_j() for counter in counters]
    known = [joules for joules in added if joules is not None]
    return sum(known) if len(known) == len(added) else None


def _micro(path: Path) -> float:
    return int(path.read_text()) / 1e6
