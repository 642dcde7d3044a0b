"""The energy of any stretch of time, measured or modelled, and what of it was work's.

Counters are read about once a second. They move in jumps, some only every few hundred milliseconds,
so a reading counts only together with the time since the one before, which is long enough
(`WINDOW_S`) and in which something was added: one that adds nothing makes the window longer, up to
`STUCK_S`. Where no window of readings covers a stretch, its energy is modelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.config import MeteringConfig
from jaxserve.errors import ConfigError
from jaxserve.metering.hours import Interval
from jaxserve.metering.power.counters import (
    Counter,
    nvml_counters,
    rapl_counters,
    total_added_j,
)
from jaxserve.metering.power.modelled import modelled_device

WINDOW_S = 0.9
STUCK_S = 10.0
#: Windows are kept for so long.
_KEPT_S = 120.0
#: Nothing that one server has takes more: a reading that says so is none.
_MOST_W = 1e6


class Window(NamedTuple):
    """Between two readings."""

    start_ns: int
    end_ns: int
    watts: float


class Power:
    """See the module.

    Args:
        counters: none where nothing measures.
        idle_w, busy_w: of all devices, for the model, and for what an idle device takes.

    Attributes:
        source: "nvml", "rapl", or "modelled" while nothing is measured.
        watts: of the last interval.
        modelled_s: so much time has been modelled.
    """

    def __init__(self, counters: Sequence[Counter], idle_w: float, busy_w: float) -> None:
        self._counters = list(counters)
        self._idle_w = idle_w
        self._busy_w = busy_w
        self._windows: deque[Window] = deque()
        self._open_ns: int | None = None
        self._open_j = 0.0
        self._last_ok_ns: int | None = None
        self.watts = idle_w
        self.modelled_s = 0.0

    @property
    def busy_w(self) -> float:
        """What the devices take at work, before anything was measured."""
        return self._busy_w

    @property
    def source(self) -> str:
        """What the energy of the last reading came from."""
        if self._counters and self._last_ok_ns is not None:
            return self._counters[0].name.split(":")[0].removeprefix("intel-")
        return "modelled"

    def read(self, now_ns: int) -> None:
        """Reads the counters, now."""
        if not self._counters:
            return
        added_j = total_added_j(self._counters)
        if added_j is None or self._open_ns is None:
            if added_j is None and self._open_ns is not None:
                self._last_ok_ns = None
            self._open_ns, self._open_j = now_ns, 0.0
            return
        self._open_j += added_j
        length_s = (now_ns - self._open_ns) / 1e9
        if length_s < WINDOW_S:
            return
        watts = self._open_j / length_s
        if self._open_j > 0 and watts <= _MOST_W:
            self._windows.append(Window(self._open_ns, now_ns, watts))
            self._last_ok_ns = now_ns
        elif length_s < STUCK_S:
            return
        else:
            self._last_ok_ns = None
        self._open_ns, self._open_j = now_ns, 0.0
        while self._windows and now_ns - self._windows[0].end_ns > _KEPT_S * 1e9:
            self._windows.popleft()

    def measure(self, interval: Interval) -> tuple[float, float]:
        """Joules of an interval, and of these what its busy time took.

        The rest is idle power over its idle time.
        """
        length_s = (interval.end_ns - interval.start_ns) / 1e9
        busy_s = min(interval.busy_ns / 1e9, length_s)
        covered_s = energy_j = 0.0
        for window in self._windows:
            overlap_ns = min(window.end_ns, interval.end_ns) - max(
                window.start_ns, interval.start_ns
            )
            if overlap_ns > 0:
                covered_s += overlap_ns / 1e9
                energy_j += window.watts * overlap_ns / 1e9
        missing_s = max(length_s - covered_s, 0.0)
        if missing_s > 1e-6:
            modelled_w = self._idle_w + (self._busy_w - self._idle_w) * busy_s / length_s
            energy_j += modelled_w * missing_s
            self.modelled_s += missing_s
        self.watts = energy_j / length_s
        if busy_s == 0:
            return energy_j, 0.0
        idle_j = min(self._idle_w * (length_s - busy_s), energy_j)
        return energy_j, energy_j - idle_j


def _indexes(gpus: Sequence[str]) -> list[int]:
    if not all(gpu.isdecimal() for gpu in gpus):
        raise ConfigError(f"metering.gpus must be indexes, as 0,1, got {','.join(gpus)!r}")
    return [int(gpu) for gpu in gpus]


def check_power(config: MeteringConfig) -> None:
    """Looks at the settings, and at no counter; raises as `make_power`."""
    modelled_device(config)
    _indexes(config.gpus)


def make_power(config: MeteringConfig) -> Power:
    """As configured: NVML if it counts, else RAPL if it may be read, else the model.

    Raises:
        ConfigError: the device is not known, or a GPU's index is none.
    """
    device = modelled_device(config)
    counters: list[Counter] = []
    if config.power in ("auto", "nvml"):
        counters = nvml_counters(_indexes(config.gpus))
    if config.power == "rapl" or (config.power == "auto" and not counters):
        counters = rapl_counters()
    return Power(counters, device.idle_w * config.devices, device.busy_w * config.devices)
