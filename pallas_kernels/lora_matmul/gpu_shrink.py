"""x a^T on Hopper: a tile of 64 tokens, one part of K, some columns of z.

    x[tile, part]    --TMA--> shared memory, step by step, once
    a[layer, s, c]   --TMA--> | s0 s1 s2 … | s8 s9 … |      c: the block's columns
                                product of all 64 rows with several slots' columns side by side;
                                each row keeps the columns of its own slot

A block writes its columns for all rows of the tile, so that nobody else writes there, whatever
slots the tokens have. Rows of tokens without an adapter are zero, and tiles without any are not
written.
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
from pallas_kernels.lora_matmul.gpu_plan import (
    RANK_MULTIPLE,
    ShrinkPlan,
    padding,
    shrink_bytes,
)


def shrink(
    x: Float[Array, "T8 K"],
    a: Float[Array, "L S PR K"],
    tiles: TokenTiles,
    layer: Int[Array, "1"],
    plan: ShrinkPlan,
    rank: int,
    interpret: Any,
) -> Float[Array, "D I*64 PR+"]:
    """z of each token, D parts of K to be added up; undefined in tiles without adapters.

    Behind its P R columns are as many, undefined, as `expand` reads beyond the last part's rank.

    Args:
        x: of tokens, filled up to whole rows of eight.
    """
    (num_tiles, most), (rows, depth), wide = tiles.present.shape, x.shape, a.shape[2]
    cost = pl.CostEstimate(
        flops=2 * num_tiles * TILE * wide * depth,
        transcendentals=0,
        bytes_accessed=shrink_bytes(plan, num_tiles, most, depth, x.dtype.itemsize),
    )
    width = wide + padding(rank)
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan, rows=min(TILE, rows)),
        out_type=jax.ShapeDtypeStruct((plan.splits, num_tiles * TILE, width), jnp.float32),
        scratch_types=(
            hopper.swizzled((plan.steps, TILE, plan.step), DEPTH, x.dtype),
            hopper.swizzled((plan.slots, plan.together * plan.columns, plan.step), DEPTH, a.dtype),
            plgpu.SMEM((TILE,), jnp.int32),
            # In swizzles that z, with what is behind its columns, is a whole number of.
            hopper.swizzled((TILE, plan.columns), RANK_MULTIPLE, jnp.float32),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=1 + plan.together, num_barriers=plan.slots),
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
#: In place of a slot: no token's.
_NOBODY = -1


def _kernel(
    x, a, layer, slots, present, num_present, z,
    x_smem, ring, slots_smem, z_smem, begun, ready, free,
    *, plan: ShrinkPlan, rows: int,
) -> None:  # fmt: skip
    split, chunk, tile = (lax.axis_index(name) for name in ("split", "chunk", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    number, count, is_live = begin(layer, present, num_present, tile)
    last = present.shape[1] - 1
    turns = (count + plan.together - 1) // plan.together
    depth, column = split * (plan.steps * plan.step), chunk * plan.columns

    @pl.when((warpgroup == 1) & is_live)
    def _() -> None:
        plgpu.copy_gmem_to_smem(slots.at[pl.ds(tile * TILE, TILE)], slots_smem, begun)

        def load(i: Any, place: Any) -> None:
            turn, step = i // plan.steps, lax.rem(i, jnp.int32(plan.steps))
            part = pl.ds(depth + step * plan.step, plan.step)

            def copy_x() -> None:
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(tile * TILE, rows), part],
                    x_smem.at[step, pl.ds(0, rows)],
                    ready.at[place],
                )

            _either(turn == 0, copy_x, ready.at[place])
            first = turn * plan.together
            # Read before the copies, which no read passes.
            found = [present[tile, jnp.minimum(first + nth, last)] for nth in range(plan.together)]
            for nth, own in enumerate(found):

                def copy_a(nth: int = nth, own: Any = own) -> None:
                    plgpu.copy_gmem_to_smem(
                        a.at[number, own, pl.ds(column, plan.columns), part],
                        ring.at[place, pl.ds(nth * plan.columns, plan.columns)],
                        ready.at[place],
                    )

                _either(first + nth < count, copy_a, ready.at[place])

        hopper.ahead(turns * plan.steps, plan.slots, free, load)

    def keep(turn: Any, z: Float[Array, "64 C"]) -> Float[Array, "64 C"]:
        def multiply(out: Any) -> Float[Array, "64 QC"]:
            def place_of(step: Any) -> Any:
                return lax.rem(turn * plan.steps + step, jnp.int32(plan.slots))

            def one(step: Any, _: None) -> None:
                place = place_of(step)
                hopper.await_ring(ready, place)
                plgpu.wgmma(out, x_smem.at[step], ring.at[place].transpose((1, 0)))
                # The step before has been multiplied when at most this one is under way.
                plgpu.wgmma_wait(1)
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[place_of(step - 1)]))

            lax.fori_loop(0, plan.steps, one, None)
            product = out[...]
            plgpu.barrier_arrive(free.at[place_of(plan.steps - 1)])
            return product

        width = plan.together * plan.columns
        product = pl.run_scoped(multiply, hopper.accumulator(TILE, width))
        rows_slots = hopper.row_values(slots_smem, z)
        for nth in range(plan.together):
            index = turn * plan.together + nth
            own = jnp.where(index < count, present[tile, jnp.minimum(index, last)], _NOBODY)
            first = nth * plan.columns
            z = jnp.where(rows_slots == own, product[:, first : first + plan.columns], z)
        return z

    @pl.when((warpgroup == 0) & is_live)
    def _() -> None:
        plgpu.barrier_wait(begun)
        nothing = plgpu.layout_cast(
            jnp.zeros((TILE, plan.columns), jnp.float32), plgpu.Layout.WGMMA
        )
        z_smem[...] = lax.fori_loop(0, turns, keep, nothing)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            z_smem.at[pl.ds(0, rows)],
            z.at[split, pl.ds(tile * TILE, rows), pl.ds(column, plan.columns)],
        )
        plgpu.wait_smem_to_gmem(0)


def begin(layer: Any, present: Any, num_present: Any, tile: Any) -> tuple[Any, Any, Any]:
    """The layer, how many slots have tokens in a tile, and whether any has.

    All that the first copies are told by is read for the answer, and so at once: a branch in front
    of the other two would cost the way to memory again.
    """
    number, count = layer[0], num_present[tile]
    return number, count, (count > 0) & (present[tile, 0] >= 0) & (number >= 0)


def _either(condition: Any, copy: Any, barrier: Any) -> None:
    """A copy, or at least its arrival."""
    pl.when(condition)(copy)
    pl.when(jnp.logical_not(condition))(lambda: plgpu.barrier_arrive(barrier))
