"""x a^T on Hopper: a tile of 64 tokens, one part of K, at most 128 columns of z.

    x[tile, part] --TMA--> shared memory, once
    a[layer, s]   --TMA--> | slot 0 | slot 1 | …      s: the slots that have tokens in the tile
                              product of all 64 rows; rows of s's tokens are kept

Rows of tokens without an adapter are left zero, and tiles without any are not written.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.lora_matmul.blocks import TILE, TokenTiles
from pallas_kernels.lora_matmul.gpu_plan import ShrinkPlan, shrink_bytes, shrink_plan


def shrink(
    x: Float[Array, "T8 K"],
    a: Float[Array, "L S PR K"],
    tiles: TokenTiles,
    layer: Int[Array, "1"],
    interpret: Any,
) -> Float[Array, "D I*64 PR"]:
    """z of each token, D parts of K to be added up; undefined in tiles without adapters.

    Args:
        x: of tokens, filled up to whole rows of eight.
    """
    (num_tiles, most), (rows, depth), wide = tiles.present.shape, x.shape, a.shape[2]
    plan = shrink_plan(num_tiles, depth, wide, x.dtype.itemsize)
    cost = pl.CostEstimate(
        flops=2 * num_tiles * TILE * wide * depth,
        transcendentals=0,
        bytes_accessed=shrink_bytes(plan, num_tiles, most, depth, x.dtype.itemsize),
    )
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan, rows=min(TILE, rows)),
        out_type=jax.ShapeDtypeStruct((plan.splits, num_tiles * TILE, wide), jnp.float32),
        scratch_types=(
            hopper.swizzled((plan.steps, TILE, plan.step), DEPTH, x.dtype),
            hopper.swizzled((plan.slots, plan.columns, plan.step), DEPTH, a.dtype),
            plgpu.SMEM((TILE,), jnp.int32),
            plgpu.SMEM((TILE, plan.columns), jnp.float32),
            plgpu.Barrier(num_arrivals=plan.steps + 1),
            plgpu.Barrier(num_barriers=plan.slots),
            plgpu.Barrier(num_barriers=plan.slots),
        ),
        grid=(plan.splits, plan.chunks, num_tiles),
        grid_names=("split", "chunk", "tile"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        **hopper.estimated(cost),
    )(x, a, layer, tiles.slots, tiles.present, tiles.num_present)


#: Elements of a row of swizzled shared memory.
DEPTH = 64


def _kernel(
    x, a, layer, slots, present, num_present, z,
    x_smem, ring, slots_smem, z_smem, x_ready, ready, free,
    *, plan: ShrinkPlan, rows: int,
) -> None:  # fmt: skip
    split, chunk, tile = (lax.axis_index(name) for name in ("split", "chunk", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    count = num_present[tile]
    depth = split * (plan.steps * plan.step)

    @pl.when((warpgroup == 1) & (count > 0))
    def _() -> None:
        plgpu.copy_gmem_to_smem(slots.at[pl.ds(tile * TILE, TILE)], slots_smem, x_ready)
        for step in range(plan.steps):
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(tile * TILE, rows), pl.ds(depth + step * plan.step, plan.step)],
                x_smem.at[step, pl.ds(0, rows)],
                x_ready,
            )

        def load(i: Any, place: Any) -> None:
            own, step = present[tile, i // plan.steps], lax.rem(i, jnp.int32(plan.steps))
            plgpu.copy_gmem_to_smem(
                a.at[
                    layer[0],
                    own,
                    pl.ds(chunk * plan.columns, plan.columns),
                    pl.ds(depth + step * plan.step, plan.step),
                ],
                ring.at[place],
                ready.at[place],
            )

        hopper.ahead(count * plan.steps, plan.slots, free, load)

    def keep(index: Any, z: Float[Array, "64 C"]) -> Float[Array, "64 C"]:
        def multiply(out: Any) -> Float[Array, "64 C"]:
            def one(step: Any, _: None) -> None:
                place = lax.rem(index * plan.steps + step, jnp.int32(plan.slots))
                hopper.await_ring(ready, place)
                plgpu.wgmma(out, x_smem.at[step], ring.at[place].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[place])

            lax.fori_loop(0, plan.steps, one, None)
            return out[...]

        product = pl.run_scoped(multiply, hopper.accumulator(TILE, plan.columns))
        return jnp.where(hopper.row_values(slots_smem, product) == present[tile, index], product, z)

    @pl.when((warpgroup == 0) & (count > 0))
    def _() -> None:
        plgpu.barrier_wait(x_ready)
        nothing = plgpu.layout_cast(
            jnp.zeros((TILE, plan.columns), jnp.float32), plgpu.Layout.WGMMA
        )
        z_smem[...] = lax.fori_loop(0, count, keep, nothing)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            z_smem,
            z.at[split, pl.ds(tile * TILE, TILE), pl.ds(chunk * plan.columns, plan.columns)],
        )
        plgpu.wait_smem_to_gmem(0)
