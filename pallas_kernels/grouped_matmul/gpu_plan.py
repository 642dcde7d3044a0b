"""How the Hopper kernel of grouped_matmul cuts up a call: tiles of rows, and blocks of columns.

    group      0 0 0 0 0 0 0 2 2 2 2 2 5 5 . .     (. is no group's)
    tiles     [0 0 0 0 0 0 0 - -]                  rows of group 0; what is not is not stored
                            [2 2 2 2 2 - - -]      begins at a whole row of shared memory: of eight
                                      [5 5 - -]
                                          [. .]    zeros

A tile has rows of one group, so that a group's matrix is read once for each of its tiles. It begins
where the group does, rounded down to eight, which is where TMA can begin, so that groups of few
rows have one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul.tunables import GpuGrouped
from pallas_kernels.hopper import PROCESSORS, ROWS
from pallas_kernels.tuning import tuned

#: Rows that a tile's beginning is a multiple of.
ALIGNED = 8
#: K of one slot of the ring; a row of shared memory of 128 bytes.
STEP = 64
#: Warpgroups that multiply, each its own columns.
COMPUTERS = 2
#: N is a multiple of this: columns of one warpgroup are multiples of 64.
COLUMN_MULTIPLE = 128
#: Columns that leave together.
STAGED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Of one call.

    Attributes:
        rows: of a tile, 64 or 128.
        columns: of a block of threads.
        slots: of the ring; each holds `rows` + `columns` times STEP.
        band: tiles whose blocks of columns are computed together.
    """

    rows: int
    columns: int
    slots: int
    band: int


class Tiles(NamedTuple):
    """Of all groups in order, and of the rows behind the last.

    Attributes:
        row: the first, a multiple of ALIGNED.
        group: whose; E for rows of no group.
        begin, end: the group's own, counted from `row`.
    """

    row: Int[Array, "I"]
    group: Int[Array, "I"]
    begin: Int[Array, "I"]
    end: Int[Array, "I"]


def make_plan(num_rows: int, num_groups: int, num_columns: int) -> Plan:
    """By the average number of a group's rows, and by what fills the processors."""
    chosen = tuned(GpuGrouped)
    rows = tile_rows(num_rows, num_groups)
    tiles = min(num_groups, num_rows) + num_rows // rows

    def cost(columns: int) -> int:
        rounds = -(-tiles * (num_columns // columns) // PROCESSORS)
        return rounds * (columns + rows)

    fitting = [n for n in (chosen.widest, COLUMN_MULTIPLE) if num_columns % n == 0]
    columns = min(fitting, key=cost)
    slots = chosen.ring_bytes // ((rows + columns) * STEP * 2)
    return Plan(rows=rows, columns=columns, slots=slots, band=chosen.band)


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: two products high where groups fill more than one."""
    return ROWS if num_rows <= ROWS * num_groups else 2 * ROWS


def most_tiles(num_rows: int, num_groups: int, rows: int) -> int:
    """No group sizes have more tiles."""
    pieces = min(num_groups + 1, num_rows)
    return (num_rows + pieces * (rows + ALIGNED - 2)) // rows


def make_tiles(
    group_sizes: Int[Array, "E"], num_rows: int, rows: int
) -> tuple[Tiles, Int[Array, "1"]]:
    """The tiles, and how many of them there are; others are not looked at."""
    num_groups = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, num_rows - jnp.sum(sizes))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    aligned = starts // ALIGNED * ALIGNED
    counts = jnp.where(sizes > 0, -(-(ends - aligned) // rows), 0)
    tile_ends = jnp.cumsum(counts)
    tile = jnp.arange(most_tiles(num_rows, num_groups, rows), dtype=jnp.int32)
    group = jnp.minimum(
        jnp.sum(tile_ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), num_groups
    )
    row = aligned[group] + (tile - (tile_ends - counts)[group]) * rows
    return Tiles(
        row=row,
        group=group,
        begin=jnp.maximum(starts[group] - row, 0),
        end=jnp.minimum(ends[group] - row, rows),
    ), tile_ends[-1:]


def grouped_bytes(plan: Plan, num_tiles: int, depth: int, num_columns: int) -> int:
    """Into shared memory and out, of 16 bits each: less comes from memory, the rest from L2."""
    blocks = num_columns // plan.columns
    operands = num_tiles * blocks * (plan.rows + plan.columns) * depth
    return 2 * (operands + num_tiles * plan.rows * num_columns)
