"""z b on Hopper, added to a tile of 64 tokens and at most 128 columns of y, in place.

    y[tile, n]     --TMA--> shared memory ──────────────┐
    z[tile, part]  --TMA--> shared memory, once         ├─▶ y[tile, n], in place
    b[layer, s, n] --TMA--> | slot 0 | slot 1 | … ──────┘  rows of s's tokens

A tile of y without adapters is neither read nor written.
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
    ExpandPlan,
    expand_bytes,
    expand_plan,
    operand_rank,
    part_bounds,
)


def expand(
    z: Float[Array, "I*64 PR"],
    y: Any,
    b: Float[Array, "L S R N"],
    tiles: TokenTiles,
    layer: Int[Array, "1"],
    cycle: tuple[int, ...],
    interpret: Any,
) -> None:
    """Adds to y, a reference to [T, N]; z has the rank of each part filled up with zeros."""
    (num_tiles, most), (num_tokens, num_columns) = tiles.present.shape, y.shape
    rank, itemsize = b.shape[2], b.dtype.itemsize
    plan = expand_plan(num_tiles, num_columns, rank, cycle, itemsize)
    deep = operand_rank(rank)
    cost = pl.CostEstimate(
        flops=2 * num_tiles * TILE * rank * num_columns,
        transcendentals=0,
        bytes_accessed=expand_bytes(plan, num_tiles, most, num_columns, rank, itemsize),
    )
    # Whole rows of eight lie as a product does, others one behind the other: by ever fewer.
    rows = min(TILE, num_tokens)
    piece = rows if num_tokens <= TILE or num_tokens % 8 == 0 else num_tokens & -num_tokens
    # What fills up b's rows in the ring, where its rank is an odd number of eights.
    zeros = jnp.zeros((deep - rank or 8, plan.columns), b.dtype)
    plgpu.kernel(
        functools.partial(_kernel, plan=plan, rows=rows, piece=piece, rank=rank, cycle=cycle),
        out_type=(),
        scratch_types=(
            hopper.swizzled((TILE, deep), deep, z.dtype),
            # Both operands of a product lie alike.
            hopper.swizzled((plan.slots, deep, plan.columns), deep, b.dtype),
            plgpu.SMEM((TILE,), jnp.int32),
            plgpu.SMEM((TILE, plan.columns), b.dtype),
            plgpu.Barrier(num_arrivals=2 + rows // piece + (plan.slots if deep > rank else 0)),
            plgpu.Barrier(num_barriers=plan.slots),
            plgpu.Barrier(num_barriers=plan.slots),
        ),
        grid=(num_columns // plan.columns, num_tiles),
        grid_names=("block", "tile"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        **hopper.estimated(cost),
    )(z, b, layer, tiles.slots, tiles.present, tiles.num_present, zeros, y)


def _kernel(
    z, b, layer, slots, present, num_present, zeros, y,
    z_smem, ring, slots_smem, y_smem, begun, ready, free,
    *, plan: ExpandPlan, rows: int, piece: int, rank: int, cycle: tuple[int, ...],
) -> None:  # fmt: skip
    block, tile = lax.axis_index("block"), lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    count = num_present[tile]
    deep = z_smem.shape[1]

    def pieces() -> Iterator[tuple[Any, Any]]:
        """Rows of y and where they are in shared memory."""
        for row in range(0, rows, piece):
            columns = pl.ds(block * plan.columns, plan.columns)
            yield y.at[pl.ds(tile * TILE + row, piece), columns], y_smem.at[pl.ds(row, piece)]

    @pl.when((warpgroup == 1) & (count > 0))
    def _() -> None:
        within = lax.rem(block * plan.columns, jnp.int32(sum(cycle)))
        part = sum((within >= bound).astype(jnp.int32) for bound in part_bounds(cycle))
        plgpu.copy_gmem_to_smem(slots.at[pl.ds(tile * TILE, TILE)], slots_smem, begun)
        plgpu.copy_gmem_to_smem(
            z.at[pl.ds(tile * TILE, TILE), pl.ds(part * deep, deep)], z_smem, begun
        )
        for there, here in pieces():
            plgpu.copy_gmem_to_smem(there, here, begun)
        if deep > rank:
            for place in range(plan.slots):
                rest = ring.at[place, pl.ds(rank, deep - rank)]
                plgpu.copy_gmem_to_smem(zeros, rest, begun)

        def load(i: Any, place: Any) -> None:
            plgpu.copy_gmem_to_smem(
                b.at[layer[0], present[tile, i], :, pl.ds(block * plan.columns, plan.columns)],
                ring.at[place, pl.ds(0, rank)],
                ready.at[place],
            )

        hopper.ahead(count, plan.slots, free, load)

    def keep(index: Any, delta: Float[Array, "64 C"]) -> Float[Array, "64 C"]:
        place = lax.rem(index, jnp.int32(plan.slots))
        hopper.await_ring(ready, place)

        def multiply(out: Any) -> Float[Array, "64 C"]:
            plgpu.wgmma(out, z_smem, ring.at[place])
            return out[...]

        product = pl.run_scoped(multiply, hopper.accumulator(TILE, plan.columns))
        plgpu.barrier_arrive(free.at[place])
        is_own = hopper.row_values(slots_smem, product) == present[tile, index]
        return jnp.where(is_own, product, delta)

    @pl.when((warpgroup == 0) & (count > 0))
    def _() -> None:
        plgpu.barrier_wait(begun)
        nothing = plgpu.layout_cast(
            jnp.zeros((TILE, plan.columns), jnp.float32), plgpu.Layout.WGMMA
        )
        delta = lax.fori_loop(0, count, keep, nothing)
        base = plgpu.load(y_smem, layout=plgpu.Layout.WGMMA)
        y_smem[...] = (base.astype(jnp.float32) + delta).astype(y_smem.dtype)
        plgpu.commit_smem()
        for there, here in pieces():
            plgpu.copy_smem_to_gmem(here, there)
        plgpu.wait_smem_to_gmem(0)
