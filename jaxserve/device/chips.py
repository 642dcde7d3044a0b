"""Accelerators by name: what one of them holds, moves and computes, and slices of several.

Figures of the makers, for computing what would fit and how fast it could be at best; nothing is
measured here. A device is what JAX calls one: half a chip of a TPU7x.

Sources: Google Cloud's pages of TPU v5e, TPU v6e and TPU7x; NVIDIA's data sheets of H100 SXM and
H200 SXM (dense, without sparsity). Memory is what XLA's compilers let a program have: 0.25 GiB of
a TPU v5e, 0.76 of a v6e and 1.26 of half a TPU7x are kept back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxserve.device.memory import Memory
from jaxserve.errors import ConfigError
from jaxserve.types import DeviceInfo

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        name: as it is given on the command line.
        platform: JAX's name for it.
        devices: JAX devices of one chip.
        memory_bytes: of one device.
        bandwidth: of one device's memory, bytes a second.
        flops: of one device in bfloat16, operations a second.
        capability: compute capability of a GPU; None for a TPU.
        kinds: what JAX calls its devices.
    """

    name: str
    platform: str
    devices: int = 1
    memory_bytes: int
    bandwidth: float
    flops: float
    capability: str | None = None
    kinds: tuple[str, ...]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            kinds=("TPU v5 lite", "TPU v5e"),
            platform="tpu",
            memory_bytes=int(15.75 * _GIB),
            bandwidth=0.8e12,
            flops=197e12,
        ),
        Chip(
            name="v6e",
            kinds=("TPU v6 lite", "TPU v6e"),
            platform="tpu",
            memory_bytes=int(31.24 * _GIB),
            bandwidth=1.6e12,
            flops=918e12,
        ),
        Chip(
            name="tpu7x",
            kinds=("TPU7x",),
            platform="tpu",
            devices=2,
            memory_bytes=int(94.74 * _GIB),
            bandwidth=3.69e12,
            flops=1153.5e12,
        ),
        Chip(
            name="h100",
            kinds=("NVIDIA H100 80GB HBM3",),
            platform="gpu",
            memory_bytes=84_942_979_072,
            bandwidth=3.35e12,
            flops=989e12,
            capability="9.0",
        ),
        Chip(
            name="h200",
            kinds=("NVIDIA H200",),
            platform="gpu",
            memory_bytes=151_397_597_184,
            bandwidth=4.8e12,
            flops=989e12,
            capability="9.0",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Slice:
    """Chips that work together, such as v5e:4x4.

    Attributes:
        shape: chips along each axis.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As `parse_slice` takes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        """JAX devices of all chips."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def memory(self) -> Memory:
        """Of one device, with nothing in it."""
        size = self.chip.memory_bytes
        return Memory(total_bytes=size, free_bytes=size)


def device_info(kind: str, count: int) -> DeviceInfo:
    """What is known of devices that JAX calls `kind`; other boards of one chip are other kinds."""
    chip = next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
    if chip is None:
        return DeviceInfo(kind=kind, count=count)
    return DeviceInfo(kind=kind, count=count, flops_per_s=chip.flops, bytes_per_s=chip.bandwidth)


def parse_slice(text: str) -> Slice:
    """A slice by its name: chip:AxBxC, or chip for one.

    Raises:
        ConfigError: an unknown chip, or a shape that is none.
    """
    name, _, shape = text.partition(":")
    chip = CHIPS.get(name.lower())
    if chip is None:
        raise ConfigError(f"{text!r} names no known chip: there are {', '.join(CHIPS)}")
    sizes = shape.split("x") if shape else ["1"]
    if not all(size.isascii() and size.isdigit() and 0 < int(size) <= 4096 for size in sizes):
        raise ConfigError(f"{text!r} is no topology: write {chip.name}:4x4, or {chip.name}:1")
    return Slice(chip, tuple(map(int, sizes)))
