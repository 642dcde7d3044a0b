"""Numbers of the kernel for 4-bit codes that a measurement decides; see `pallas_kernels.tuning`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pallas_kernels.tuning import Tunables, tunable


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuInt4(Tunables):
    """On Hopper.

    Attributes:
        ring_bytes: of shared memory: as much as a processor must ask for in advance, and more.
    """

    OP: ClassVar[str] = "quant_matmul"
    KERNEL: ClassVar[str] = "gpu"

    ring_bytes: int = tunable(
        96 << 10, least=48 << 10, most=96 << 10, multiple=1 << 10, tried=(64 << 10, 80 << 10)
    )
