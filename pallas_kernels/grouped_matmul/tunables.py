"""Numbers of the grouped kernel that a measurement decides; see `pallas_kernels.tuning`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pallas_kernels.tuning import Tunables, tunable


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuGrouped(Tunables):
    """On Hopper.

    Attributes:
        band: tiles whose blocks of columns are computed together, so that the L2 cache has both
            operands.
        widest: columns of a block of threads, at most.
        ring_bytes: of shared memory; results pass through 16 KiB more.
    """

    OP: ClassVar[str] = "grouped_matmul"
    KERNEL: ClassVar[str] = "gpu"

    band: int = tunable(8, least=1, most=128, tried=(4, 16))
    widest: int = tunable(256, least=128, most=256, multiple=128, tried=(128,))
    ring_bytes: int = tunable(
        192 << 10, least=96 << 10, most=192 << 10, multiple=1 << 10, tried=(144 << 10,)
    )
