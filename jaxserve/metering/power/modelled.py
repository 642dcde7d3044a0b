"""Power from a table, where nothing measures it: idle power, and more in proportion to use."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import MeteringConfig
from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one device takes.

    Attributes:
        idle_w: with nothing to do; busy_w: at work, its maker's limit.
        source: of the figures.
    """

    idle_w: float
    busy_w: float
    source: str


#: TPUs are not here: their maker publishes no figures, so theirs are configured.
DEVICES = {
    "h100": Device(idle_w=70, busy_w=700, source="NVIDIA H100 SXM data sheet; idle as NVML reads"),
    "h200": Device(idle_w=75, busy_w=700, source="NVIDIA H200 SXM data sheet; idle as NVML reads"),
    "a100": Device(idle_w=55, busy_w=400, source="NVIDIA A100 SXM data sheet; idle as NVML reads"),
    "l4": Device(idle_w=16, busy_w=72, source="NVIDIA L4 data sheet; idle as NVML reads"),
    "cpu": Device(idle_w=50, busy_w=150, source="a guess at a small server; set your own"),
}


def modelled_device(config: MeteringConfig) -> Device:
    """The configured device.

    Raises:
        ConfigError: it is not in the table, or it takes less at work than idle.
    """
    if config.device not in DEVICES:
        names = ", ".join(DEVICES)
        raise ConfigError(
            f"metering.device must be one of {names}, got {config.device!r}; for others set "
            "metering.idle_watts and metering.busy_watts"
        )
    known = DEVICES[config.device]
    idle_w = config.idle_watts or min(known.idle_w, config.busy_watts or known.idle_w)
    device = Device(
        idle_w=idle_w,
        busy_w=config.busy_watts or max(known.busy_w, idle_w),
        source=known.source,
    )
    if device.busy_w < device.idle_w:
        raise ConfigError(
            f"metering.busy_watts is {device.busy_w:g}, below the {device.idle_w:g} of "
            "metering.idle_watts"
        )
    return device
