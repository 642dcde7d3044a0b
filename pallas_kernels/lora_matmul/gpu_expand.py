"""y + z b on Hopper: a tile of 64 tokens, at most 256 columns of one part, y changed in place.

    y[tile, n]       --TMA--> shared memory ────────────────────────────┐
    z[:, tile, part] --TMA--> shared memory ─▶ added up, in 16 bits ─┐  ├─▶ y[tile, n], in place
    b[layer, s, n]   --TMA--> | slot 0 | slot 1 | … ─────────────────┴──┘  rows of s's tokens

A tile of y without adapters is neither read nor written. One warpgroup copies; one multiplies, or
two do, half of the columns each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.lora_matmul.blocks import TILE, TokenTiles
from pallas_kernels.lora_matmul.gpu_plan import (
    RANK_MULTIPLE,
    ExpandPlan,
    expand_bytes,
    operand_rank,
    part_bounds,
)
from pallas_kernels.lora_matmul.gpu_shrink import begin


def expand(
    z: Float[Array, "D I*64 PR+"],
    y: Any,
    b: Float[Array, "L S R N"],
    tiles: TokenTiles,
    layer: Int[Array, "1"],
    cycle: tuple[int, ...],
    plan: ExpandPlan,
    interpret: Any,
) -> None:
    """Adds to y, a reference to [T, N].

    Args:
        z: as `shrink` has it, in float32; or, of ranks that are not filled up, in b's dtype.
    """
    (num_tiles, most), (num_tokens, num_columns) = tiles.present.shape, y.shape
    rank, itemsize, splits = b.shape[2], b.dtype.itemsize, z.shape[0]
    deep = operand_rank(rank)
    cost = pl.CostEstimate(
        flops=2 * num_tiles * TILE * rank * num_columns,
        transcendentals=0,
        bytes_accessed=expand_bytes(
            plan,
            splits if z.dtype == jnp.float32 else 0,
            num_tiles,
            most,
            num_columns,
            rank,
            itemsize,
        ),
    )
    # Whole rows of eight lie as a product does, others one behind the other: by ever fewer.
    rows = min(TILE, num_tokens)
    piece = rows if num_tokens <= TILE or num_tokens % 8 == 0 else num_tokens & -num_tokens
    arrivals = plan.computers * (1 if deep == rank else 2)
    plgpu.kernel(
        functools.partial(_kernel, plan=plan, rows=rows, piece=piece, rank=rank, cycle=cycle),
        out_type=(),
        scratch_types=(
            # In swizzles that a part of z begins with, whatever its rank.
            hopper.swizzled((splits, TILE, deep), rank, z.dtype),
            hopper.swizzled((plan.computers, TILE, deep), deep, b.dtype),
            # Both operands of a product lie alike.
            hopper.swizzled((plan.slots, plan.computers, deep, plan.columns), deep, b.dtype),
            plgpu.SMEM((TILE,), jnp.int32),
            plgpu.SMEM((plan.computers, TILE, plan.columns), b.dtype),
            plgpu.Barrier(num_arrivals=1 + splits),
            plgpu.Barrier(num_arrivals=plan.computers * (rows // piece)),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.slots),
            plgpu.Barrier(num_arrivals=plan.computers, num_barriers=plan.slots),
        ),
        grid=(num_columns // plan.width, num_tiles),
        grid_names=("block", "tile"),
        num_threads=plan.computers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        **hopper.estimated(cost),
    )(z, b, layer, tiles.slots, tiles.present, tiles.num_present, y)


def _kernel(
    z, b, layer, slots, present, num_present, y,
    parts_smem, z_smem, ring, slots_smem, y_smem, begun, base_ready, ready, free,
    *, plan: ExpandPlan, rows: int, piece: int, rank: int, cycle: tuple[int, ...],
) -> None:  # fmt: skip
    block, tile = lax.axis_index("block"), lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    number, count, is_live = begin(layer, present, num_present, tile)
    splits, _, deep = parts_smem.shape
    column = block * plan.width

    def pieces(computer: Any) -> Iterator[tuple[Any, Any]]:
        """Rows of a warpgroup's y and where they are in shared memory."""
        for row in range(0, rows, piece):
            columns = pl.ds(column + computer * plan.columns, plan.columns)
            here = y_smem.at[computer, pl.ds(row, piece)]
            yield y.at[pl.ds(tile * TILE + row, piece), columns], here

    @pl.when((warpgroup == plan.computers) & is_live)
    def _() -> None:
        within = lax.rem(column, jnp.int32(sum(cycle)))
        part = sum((within >= bound).astype(jnp.int32) for bound in part_bounds(cycle))
        # Shared memory holds whole tiles of eight rows, and so does z.
        some = min(TILE, -(-rows // 8) * 8)
        for split in range(splits):
            plgpu.copy_gmem_to_smem(
                z.at[split, pl.ds(tile * TILE, some), pl.ds(part * rank, deep)],
                parts_smem.at[split, pl.ds(0, some)],
                begun,
            )
        plgpu.copy_gmem_to_smem(slots.at[pl.ds(tile * TILE, TILE)], slots_smem, begun)
        for computer in range(plan.computers):
            for there, here in pieces(computer):
                plgpu.copy_gmem_to_smem(there, here, base_ready)

        def load(i: Any, place: Any) -> None:
            own = b.at[number, present[tile, i]]
            for computer in range(plan.computers):
                columns = pl.ds(column + computer * plan.columns, plan.columns)
                here = ring.at[place, computer]
                plgpu.copy_gmem_to_smem(
                    own.at[:, columns], here.at[pl.ds(0, rank)], ready.at[place]
                )
                if deep > rank:
                    # Multiplied by zeros, these rows may be any, but no other adapter's.
                    plgpu.copy_gmem_to_smem(
                        own.at[pl.ds(rank - RANK_MULTIPLE, RANK_MULTIPLE), columns],
                        here.at[pl.ds(rank, RANK_MULTIPLE)],
                        ready.at[place],
                    )

        hopper.ahead(count, plan.slots, free, load)

    @pl.when((warpgroup < plan.computers) & is_live)
    def _() -> None:
        plgpu.barrier_wait(begun)
        added = _load(parts_smem.at[0])
        for split in range(1, splits):
            added += _load(parts_smem.at[split])
        if deep > rank:
            place = plgpu.broadcasted_iota(jnp.int32, added.shape, 1, layout=plgpu.Layout.WGMMA)
            added = jnp.where(place < rank, added, 0.0)
        z_smem[warpgroup] = added.astype(z_smem.dtype)
        plgpu.commit_smem()
        nothing = plgpu.layout_cast(
            jnp.zeros((TILE, plan.columns), jnp.float32), plgpu.Layout.WGMMA
        )
        rows_slots = hopper.row_values(slots_smem, nothing)

        def keep(index: Any, delta: Float[Array, "64 C"]) -> Float[Array, "64 C"]:
            place = lax.rem(index, jnp.int32(plan.slots))
            hopper.await_ring(ready, place)

            def multiply(out: Any) -> Float[Array, "64 C"]:
                plgpu.wgmma(out, z_smem.at[warpgroup], ring.at[place, warpgroup])
                return out[...]

            product = pl.run_scoped(multiply, hopper.accumulator(TILE, plan.columns))
            plgpu.barrier_arrive(free.at[place])
            return jnp.where(rows_slots == present[tile, index], product, delta)

        delta = lax.fori_loop(0, count, keep, nothing)
        plgpu.barrier_wait(base_ready)
        base = plgpu.load(y_smem.at[warpgroup], layout=plgpu.Layout.WGMMA)
        y_smem[warpgroup] = (base.astype(jnp.float32) + delta).astype(y_smem.dtype)
        plgpu.commit_smem()
        for there, here in pieces(warpgroup):
            plgpu.copy_smem_to_gmem(here, there)
        plgpu.wait_smem_to_gmem(0)


def _load(part: Any) -> Float[Array, "64 R"]:
    return plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
