"""How the Hopper kernels of lora_matmul cut up a call: numbers only, and the bytes they move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pallas_kernels.hopper import PROCESSORS
from pallas_kernels.lora_matmul.blocks import TILE

#: Of K and of the parts' widths: a row of shared memory, 128 bytes.
DEPTH_MULTIPLE = 64
RANK_MULTIPLE, MAX_RANK = 8, 128
#: Columns of z, or of y, that a block of threads has at most.
_WIDE = 128
#: K of a block of threads, at most: so much of x stays in its shared memory.
_MAX_DEPTH = 512
_SLOT_BYTES, _RING_BYTES, _MAX_SLOTS = 16 << 10, 64 << 10, 8
#: Blocks of threads that keep the memory busy.
_ENOUGH = PROCESSORS // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkPlan:
    """Of x a^T.

    Attributes:
        splits: parts of K; their results are added up afterwards.
        steps, step: K of a part is so many steps of so much.
        chunks, columns: P R is so many chunks of so many columns.
        slots: of the ring; each holds `columns` × `step`.
    """

    splits: int
    steps: int
    step: int
    chunks: int
    columns: int
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandPlan:
    """Of z b.

    Attributes:
        columns: of y, of one part, that a block of threads has.
        slots: of the ring; each holds a rank × `columns`.
    """

    columns: int
    slots: int


def shrink_plan(num_tiles: int, depth: int, wide: int, itemsize: int = 2) -> ShrinkPlan:
    """For tiles of tokens of K = depth, and z of P R = wide columns."""
    chunks = next(n for n in _divisors(wide // RANK_MULTIPLE) if wide // n <= _WIDE)
    columns, wanted = wide // chunks, -(-_ENOUGH // (num_tiles * chunks))
    # As many parts as keep the memory busy, and no part so deep that x does not fit.
    splits = next(
        n
        for n in _divisors(depth // DEPTH_MULTIPLE)
        if depth // n <= _MAX_DEPTH and (n >= wanted or n == depth // DEPTH_MULTIPLE)
    )
    part = depth // splits
    steps = next(
        n
        for n in _divisors(part // DEPTH_MULTIPLE)
        if columns * (part // n) * itemsize <= _SLOT_BYTES
    )
    step = part // steps
    slots = min(_MAX_SLOTS, _RING_BYTES // (columns * step * itemsize))
    return ShrinkPlan(
        splits=splits, steps=steps, step=step, chunks=chunks, columns=columns, slots=slots
    )


def expand_plan(
    num_tiles: int, num_columns: int, rank: int, cycle: tuple[int, ...], itemsize: int = 2
) -> ExpandPlan:
    """For tiles of tokens, N = num_columns, and a cycle of parts that no block may straddle."""
    fits = all(width % _WIDE == 0 for width in cycle)
    enough = num_tiles * (num_columns // _WIDE) >= _ENOUGH
    columns = _WIDE if fits and enough else DEPTH_MULTIPLE
    slots = _RING_BYTES // (operand_rank(rank) * columns * itemsize)
    return ExpandPlan(columns=columns, slots=min(_MAX_SLOTS, slots))


def operand_rank(rank: int) -> int:
    """Depth of the second product: a multiple of 16, which is what an instruction takes."""
    return -(-rank // 16) * 16


def part_bounds(cycle: tuple[int, ...]) -> list[int]:
    """Where parts begin in a cycle, but for the first."""
    return [sum(cycle[:n]) for n in range(1, len(cycle))]


def shrink_bytes(
    plan: ShrinkPlan, num_tiles: int, num_pairs: int, depth: int, itemsize: int = 2
) -> int:
    """Into shared memory and out: x for each chunk, a for each pair of tile and slot, z's parts."""
    wide = plan.chunks * plan.columns
    tokens = plan.chunks * num_tiles * TILE * depth * itemsize
    parts = plan.splits * num_tiles * TILE * wide * 4
    return tokens + num_pairs * wide * depth * itemsize + parts


def expand_bytes(
    plan: ExpandPlan, num_tiles: int, num_pairs: int, num_columns: int, rank: int, itemsize: int = 2
) -> int:
    """Into shared memory and out: z for each block of columns, b for each pair, y in and out."""
    blocks = num_columns // plan.columns
    z = num_tiles * TILE * blocks * operand_rank(rank) * itemsize
    y = 2 * num_tiles * TILE * num_columns * itemsize
    return z + num_pairs * rank * num_columns * itemsize + y


def _divisors(number: int) -> Iterable[int]:
    return (n for n in range(1, number + 1) if number % n == 0)
