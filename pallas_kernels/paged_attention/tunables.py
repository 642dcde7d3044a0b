"""Numbers of the attention kernels that a measurement decides; see `pallas_kernels.tuning`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pallas_kernels.tuning import Tunables, tunable


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDecode(Tunables):
    """Of rows of one query on Hopper.

    Attributes:
        span: positions that one warpgroup computes at once, where the ring holds two such blocks.
        ring_bytes: of shared memory; the rest of the 227 KiB is for queries and results.
    """

    OP: ClassVar[str] = "paged_attention"
    KERNEL: ClassVar[str] = "gpu_decode"

    span: int = tunable(64, least=64, most=128, multiple=64, tried=(128,))
    ring_bytes: int = tunable(
        128 << 10, least=32 << 10, most=128 << 10, multiple=1 << 10, tried=(64 << 10,)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuChunks(Tunables):
    """Of rows of several queries on Hopper.

    Attributes:
        slots: of the ring of keys and of the ring of values, where there is room.
        span: positions of a block, where there is room.
        compute_registers, copy_registers: of a thread that computes, and of one that copies.
        copiers: warps of the copying warpgroup that copy pages.
    """

    OP: ClassVar[str] = "paged_attention"
    KERNEL: ClassVar[str] = "gpu_chunks"

    slots: int = tunable(2, least=2, most=4, tried=(3,))
    span: int = tunable(128, least=64, most=128, multiple=64, tried=(64,))
    compute_registers: int = tunable(232, least=152, most=240, multiple=8, tried=(240,))
    copy_registers: int = tunable(40, least=24, most=168, multiple=8, tried=(24,))
    copiers: int = tunable(4, least=1, most=4, tried=(1,))

    def problem(self) -> str | None:
        """Two warpgroups compute and one copies; a kernel starts with 168 registers a thread."""
        total = 2 * self.compute_registers + self.copy_registers
        if total <= 3 * 168:
            return None
        return (
            f"compute_registers={self.compute_registers} twice and "
            f"copy_registers={self.copy_registers} are {total}, of {3 * 168}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TpuDecode(Tunables):
    """Of rows of one query on a TPU.

    Attributes:
        positions: of a block of pages, where two of them have room in 4 MiB of VMEM; 256 positions
            of eight heads of 128 in bfloat16 are 1 MiB.
    """

    OP: ClassVar[str] = "paged_attention"
    KERNEL: ClassVar[str] = "tpu_decode"

    positions: int = tunable(256, least=128, most=1024, multiple=128, tried=(128, 512))


@dataclass(frozen=True, slots=True, kw_only=True)
class TpuChunks(Tunables):
    """Of rows of several queries on a TPU.

    Attributes:
        positions: of a block of pages, where two of them have room in 4 MiB of VMEM.
        query_block: tokens of a grid step; queries, results and sums of all heads are in VMEM.
    """

    OP: ClassVar[str] = "paged_attention"
    KERNEL: ClassVar[str] = "tpu_chunks"

    positions: int = tunable(512, least=128, most=1024, multiple=128, tried=(256,))
    query_block: int = tunable(64, least=8, most=128, multiple=8, tried=(32, 128))
