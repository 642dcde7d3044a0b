"""How the Hopper kernels of lora_matmul cut up a call: numbers only, and the bytes they move.

By shapes alone, never by which adapters are present: a token's bits must not depend on its company.

A decode step has one tile, and its time is that of getting going, twice a site: the blocks of
threads, not the bytes, are too few. `shrink` gets them from the columns of z first, since each of
those is written by one block whatever slots the tokens have, and from parts of K as few as will do,
since every block of `expand` reads all parts of its z. Long steps have blocks enough: there x is
read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pallas_kernels.hopper import PROCESSORS
from pallas_kernels.lora_matmul.blocks import TILE

#: Of K and of the parts' widths: a row of shared memory, 128 bytes.
DEPTH_MULTIPLE = 64
RANK_MULTIPLE, MAX_RANK = 8, 128
#: Columns of z that a block of threads has at most, and that its products have for small ranks: a
#: product of 64 rows takes as long for 8 columns as for 64.
_WIDE, _TOGETHER = 128, 64
#: Columns of y that a block of threads may have, by the warpgroups that share them.
_WIDTHS = ((256, 2), (128, 2), (64, 1))
_SLOT_BYTES, _RING_BYTES, _MAX_SLOTS = 32 << 10, 64 << 10, 8
#: Shared memory of a block of threads, beside its barriers.
SHARED_BYTES = 220 << 10
#: Blocks of threads that keep the memory busy; those that K is split for, and into how many parts.
_ENOUGH, _FEW, _MOST_SPLITS = PROCESSORS // 2, 28, 16
#: What one kernel less is worth: so much comes from the L2 cache while one gets going.
_KERNEL_BYTES = 7_200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkPlan:
    """Of x a^T.

    Attributes:
        splits: parts of K; their results are added up afterwards.
        steps, step: K of a part is so many steps of so much.
        chunks, columns: P R is so many chunks of so many columns.
        together: slots whose columns are one product.
        slots: of the ring; each holds `together` × `columns` × `step`.
    """

    splits: int
    steps: int
    step: int
    chunks: int
    columns: int
    together: int
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandPlan:
    """Of z b.

    Attributes:
        computers: warpgroups that multiply, side by side.
        columns: of y, of one part, that each of them has.
        slots: of the ring; each holds a rank × `computers` × `columns`.
    """

    computers: int
    columns: int
    slots: int

    @property
    def width(self) -> int:
        """Columns of a block of threads."""
        return self.computers * self.columns


def shrink_plan(num_tiles: int, depth: int, wide: int, most: int, itemsize: int = 2) -> ShrinkPlan:
    """For tiles of tokens of K = depth, and z of P R = wide columns.

    Args:
        most: slots that a tile may have tokens of.
    """
    cuts = [n for n in _divisors(wide // RANK_MULTIPLE) if wide // n <= _WIDE]
    numbers = list(_divisors(depth // DEPTH_MULTIPLE))

    def chunks_for(splits: int) -> int:
        return next((n for n in cuts if n * splits * num_tiles >= _ENOUGH), cuts[-1])

    def will_do(splits: int) -> bool:
        held = TILE * (depth // splits * itemsize + wide // chunks_for(splits) * 4 + 4)
        enough = splits * cuts[-1] * num_tiles >= _FEW or splits >= _MOST_SPLITS
        return enough and held + _RING_BYTES <= SHARED_BYTES

    splits = next(filter(will_do, numbers), numbers[-1])
    chunks = chunks_for(splits)
    columns, part = wide // chunks, depth // splits
    together = max(1, min(most, _TOGETHER // columns))
    steps = next(
        n
        for n in _divisors(part // DEPTH_MULTIPLE)
        if together * columns * (part // n) * itemsize <= _SLOT_BYTES
    )
    step = part // steps
    slots = min(_MAX_SLOTS, _RING_BYTES // (together * columns * step * itemsize))
    return ShrinkPlan(
        splits=splits,
        steps=steps,
        step=step,
        chunks=chunks,
        columns=columns,
        together=together,
        slots=slots,
    )


def expand_plan(
    num_tiles: int, num_columns: int, rank: int, cycle: tuple[int, ...], itemsize: int = 2
) -> ExpandPlan:
    """For tiles of tokens, N = num_columns, and a cycle of parts that no block may straddle."""
    plans = []
    for width, computers in _WIDTHS:
        slots = max(2, _RING_BYTES // (operand_rank(rank) * width * itemsize))
        plan = ExpandPlan(
            computers=computers, columns=width // computers, slots=min(_MAX_SLOTS, slots)
        )
        held = expand_shared_bytes(plan, 1, rank, itemsize)
        if held <= SHARED_BYTES and all(part % width == 0 for part in cycle):
            plans.append(plan)
    enough = (plan for plan in plans if num_tiles * (num_columns // plan.width) >= _ENOUGH)
    return next(enough, plans[-1])


def expand_adds_up(
    first: ShrinkPlan,
    second: ExpandPlan,
    num_tiles: int,
    num_columns: int,
    rank: int,
    itemsize: int = 2,
) -> bool:
    """Whether `expand` itself adds up the parts of z: cheaper than a kernel that does, and fits."""
    deep = operand_rank(rank)
    rows = num_tiles * TILE * (num_columns // second.width)
    more = rows * deep * (4 * first.splits - itemsize)
    return first.splits == 1 or (
        more <= _KERNEL_BYTES
        and expand_shared_bytes(second, first.splits, rank, itemsize) <= SHARED_BYTES
    )


def expand_shared_bytes(plan: ExpandPlan, splits: int, rank: int, itemsize: int = 2) -> int:
    """Shared memory: parts of z, z as it is multiplied, the ring, y, and the rows' slots.

    Args:
        splits: as `expand_bytes` has it.
    """
    deep = operand_rank(rank)
    ring = plan.slots * deep * plan.width * itemsize
    return (
        TILE * deep * ((4 * splits or itemsize) + plan.computers * itemsize)
        + ring
        + TILE * plan.width * itemsize
        + TILE * 4
    )


def operand_rank(rank: int) -> int:
    """Depth of the second product: a multiple of 16, which is what an instruction takes."""
    return -(-rank // 16) * 16


def padding(rank: int) -> int:
    """Columns of z behind the last part's, which is read as deep as it is multiplied."""
    return operand_rank(rank) - rank


def part_bounds(cycle: tuple[int, ...]) -> list[int]:
    """Where parts begin in a cycle, but for the first."""
    return [sum(cycle[:n]) for n in range(1, len(cycle))]


def shrink_bytes(
    plan: ShrinkPlan, num_tiles: int, num_pairs: int, depth: int, itemsize: int = 2
) -> int:
    """Into shared memory and out: x for each chunk, a for each pair of tile and slot, z's parts."""
    wide = plan.chunks * plan.columns
    tokens = plan.chunks * num_tiles * TILE * depth * itemsize
    return tokens + num_pairs * wide * depth * itemsize + parts_bytes(plan, num_tiles)


def parts_bytes(plan: ShrinkPlan, num_tiles: int) -> int:
    """What `shrink` writes: z's parts, in float32."""
    return plan.splits * num_tiles * TILE * plan.chunks * plan.columns * 4


def expand_bytes(
    plan: ExpandPlan,
    splits: int,
    num_tiles: int,
    num_pairs: int,
    num_columns: int,
    rank: int,
    itemsize: int = 2,
) -> int:
    """Into shared memory and out: z for each block of columns, b for each pair, y in and out.

    Args:
        splits: parts of z, in float32, that it adds up; 0 for their sum in the dtype of b.
    """
    blocks = num_columns // plan.width
    z = num_tiles * TILE * blocks * operand_rank(rank) * (4 * splits or itemsize)
    y = 2 * num_tiles * TILE * num_columns * itemsize
    return z + num_pairs * rank * num_columns * itemsize + y


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)
