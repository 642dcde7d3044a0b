"""grouped_matmul for NVIDIA Hopper, in Pallas (Mosaic GPU): one persistent kernel.

Math: see `api`; for each tile i of rows of one group g(i) and each block n of columns,
    y[i, n] = x[i] w[first_group + g(i), :, n], of which the group's own rows are stored.

Shapes: x [T, K], w [W, K, N] in place, whole stacks of layers too; y [T, N]. Tiles as `gpu_plan`
    lists them, by a few operations of XLA's that products with the same sizes share.

Grid: PROCESSORS blocks of threads, each of which goes through (tile, block of columns) pairs, every
    PROCESSORS-th, in bands of a few tiles, so that the tiles of a group find its columns in the L2
    cache, and the blocks of columns the tiles' rows. There are only as many pairs as rows need: a
    group without rows costs nothing, and nothing is asked of the host, as a loop of XLA's would.
    One warpgroup copies, through all pairs without a pause; two multiply:

    x[i, k]       --TMA--> | slot 0 | slot 1 | …      64 of K each
    w[g, k, n]    --TMA--> |        |        |        warpgroup 0: the left half of n's columns,
                                                      warpgroup 1: the right half

    Results pass through shared memory and leave by TMA copies of 64, 32, … 1 rows, as many as make
    up the group's own in the tile.

Traffic: a touched group's matrix once for each of its tiles, of which all but the first in a band
    come from the L2 cache; x once for each block of columns, y once. See `gpu_plan.grouped_bytes`,
    and `traffic` for the least.

Numerics: products accumulated in float32 over K in order, rounded once. A row's bits depend on
    neither its company nor its place. What is not a number stays in its own row.

Limits: bfloat16 or float16, x and w alike (Hopper multiplies float32 only rounded to tf32); no
    codes yet; K a multiple of 64 and N of 128.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.grouped_matmul.gpu_plan import (
    ALIGNED,
    COLUMN_MULTIPLE,
    COMPUTERS,
    STAGED,
    STEP,
    Plan,
    Tiles,
    grouped_bytes,
    make_plan,
    make_tiles,
    most_tiles,
)

#: Of dtypes that it does not multiply.
_WHY_NOT = {
    "float32": ", which Hopper multiplies only rounded to tf32",
    "int8": ": it reads no codes yet",
}


def unsupported(*, depth: int, num_columns: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run with such matrices; None where it can.

    Args:
        dtype: of the matrices.
    """
    name = jnp.dtype(dtype).name
    if name not in hopper.DTYPES:
        return f"it multiplies {' and '.join(hopper.DTYPES)}, not {name}{_WHY_NOT.get(name, '')}"
    if depth % STEP or num_columns % COLUMN_MULTIPLE:
        return (
            f"matrices are {depth} x {num_columns}, which must be multiples of {STEP} and "
            f"{COLUMN_MULTIPLE}"
        )
    return None


def grouped_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "W K N"] | Int[Array, "W K N"],
    group_sizes: Int[Array, "E"],
    first_group: int | Int[Array, ""],
    scale: Float[Array, "E N"] | None,
    precision: jax.lax.Precision,
    *,
    interpret: Any = None,
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`.

    Args:
        precision: of no effect: products of 16 bits are exact in float32.
        interpret: `plgpu.InterpretGPUParams()` where there is no GPU.
    """
    del precision, scale  # codes, which have one, are refused
    (num_rows, depth), num_columns, num_groups = x.shape, w.shape[2], group_sizes.shape[0]
    reason = unsupported(depth=depth, num_columns=num_columns, dtype=w.dtype)
    if reason is None and x.dtype != w.dtype:
        reason = f"x is {x.dtype} and w {w.dtype}, which must be alike"
    if reason is not None:
        raise UnsupportedKernel(f"grouped_matmul backend='gpu': {reason}; backend='xla' takes any")
    plan = make_plan(num_rows, num_groups, num_columns)
    tiles, count = make_tiles(group_sizes, num_rows, plan.rows)
    # Rows of eight, which a tile of shared memory has, and at least a tile of them.
    missing = max(plan.rows - num_rows, -num_rows % ALIGNED)
    rows = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    most = most_tiles(num_rows, num_groups, plan.rows)
    cost = pl.CostEstimate(
        flops=2 * most * plan.rows * depth * num_columns,
        transcendentals=0,
        bytes_accessed=grouped_bytes(plan, most, depth, num_columns),
    )
    half = plan.columns // COMPUTERS
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan, num_groups=num_groups),
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        scratch_types=(
            hopper.swizzled((plan.slots, plan.rows, STEP), STEP, x.dtype),
            hopper.swizzled((plan.slots, COMPUTERS, STEP, half), STEP, w.dtype),
            plgpu.SMEM((COMPUTERS, hopper.ROWS, STAGED), x.dtype),
            plgpu.Barrier(num_arrivals=1 + COMPUTERS, num_barriers=plan.slots),
            plgpu.Barrier(num_arrivals=COMPUTERS, num_barriers=plan.slots),
        ),
        grid=(hopper.PROCESSORS,),
        grid_names=("processor",),
        num_threads=COMPUTERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        **hopper.estimated(cost),
    )(rows, w, jnp.stack(tiles, axis=1), count, jnp.asarray(first_group, jnp.int32).reshape(1))


def _kernel(
    x, w, tiles, count, first_group, y,
    x_ring, w_ring, staging, ready, free,
    *, plan: Plan, num_groups: int,
) -> None:  # fmt: skip
    processor, warpgroup = lax.axis_index("processor"), lax.axis_index("warpgroup")
    num_blocks, half = y.shape[1] // plan.columns, plan.columns // COMPUTERS
    num_tiles = count[0]
    pairs = num_tiles * num_blocks
    own = (pairs - processor + hopper.PROCESSORS - 1) // hopper.PROCESSORS
    depth_steps = x.shape[1] // STEP

    def pair(turn: Any) -> tuple[Tiles, Any, Any]:
        """The tile of a turn, its first column, and how many steps it takes."""
        index = processor + turn * hopper.PROCESSORS
        whole = plan.band * num_blocks
        band, within = index // whole, lax.rem(index, jnp.int32(whole))
        height = jnp.minimum(num_tiles - band * plan.band, plan.band)
        tile = band * plan.band + lax.rem(within, height)
        found = Tiles(*(tiles[tile, field] for field in range(len(Tiles._fields))))
        return (
            found,
            within // height * plan.columns,
            jnp.where(found.group < num_groups, depth_steps, 0),
        )

    @pl.when(warpgroup == COMPUTERS)
    def _() -> None:
        plgpu.set_max_registers(hopper.COPY_REGISTERS, action="decrease")

        def copy(turn: Any, done: Any) -> Any:
            tile, column, steps = pair(turn)

            def load(step: Any, _: None) -> None:
                place = hopper.await_free(free, done + step, plan.slots)
                deep = pl.ds(step * STEP, STEP)
                row = tile.row // ALIGNED * ALIGNED
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(row, plan.rows), deep], x_ring.at[place], ready.at[place]
                )
                for side in range(COMPUTERS):
                    columns = pl.ds(column + side * half, half)
                    plgpu.copy_gmem_to_smem(
                        w.at[first_group[0] + tile.group, deep, columns],
                        w_ring.at[place, side],
                        ready.at[place],
                    )

            lax.fori_loop(0, steps, load, None)
            return done + steps

        hopper.drain(free, lax.fori_loop(0, own, copy, jnp.int32(0)), plan.slots)

    @pl.when(warpgroup < COMPUTERS)
    def _() -> None:
        plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")

        def compute(turn: Any, done: Any) -> Any:
            tile, column, steps = pair(turn)

            def multiply(*outs: Any) -> list[Float[Array, "64 C"]]:
                def one(step: Any, _: None) -> None:
                    place = lax.rem(done + step, jnp.int32(plan.slots))
                    hopper.await_ring(ready, place)
                    for high, out in enumerate(outs):
                        part = pl.ds(high * hopper.ROWS, hopper.ROWS)
                        plgpu.wgmma(out, x_ring.at[place, part], w_ring.at[place, warpgroup])
                    # The step before has been multiplied when at most this one's are under way.
                    plgpu.wgmma_wait(len(outs))

                    @pl.when(step > 0)
                    def _() -> None:
                        before = lax.rem(done + step - 1, jnp.int32(plan.slots))
                        plgpu.barrier_arrive(free.at[before])

                lax.fori_loop(0, steps, one, None)
                products = [out[...] for out in outs]

                @pl.when(steps > 0)
                def _() -> None:
                    last = lax.rem(done + steps - 1, jnp.int32(plan.slots))
                    plgpu.barrier_arrive(free.at[last])

                return products

            outs = [hopper.accumulator(hopper.ROWS, half)] * (plan.rows // hopper.ROWS)
            products = pl.run_scoped(multiply, *outs)
            for high, product in enumerate(products):
                first = jnp.clip(tile.begin - high * hopper.ROWS, 0, hopper.ROWS)
                last = jnp.clip(tile.end - high * hopper.ROWS, 0, hopper.ROWS)
                for piece in range(0, half, STAGED):
                    values = product[:, piece : piece + STAGED].astype(y.dtype)
                    _store(
                        values,
                        staging.at[warpgroup],
                        y,
                        tile.row + high * hopper.ROWS,
                        column + warpgroup * half + piece,
                        first,
                        last,
                    )
            return done + steps

        lax.fori_loop(0, own, compute, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _store(
    values: Float[Array, "64 C"], staged: Any, y: Any, row: Any, column: Any, first: Any, last: Any
) -> None:
    """Rows first … last of the values, to y's rows from `row` on."""
    plgpu.wait_smem_to_gmem(0)
    staged[...] = values
    plgpu.commit_smem()
    live = jnp.maximum(last - first, 0)
    # Copies have fixed sizes: the powers of two that make up the number of rows.
    size = hopper.ROWS
    while size:
        if size <= y.shape[0]:
            here = pl.ds(first, size)

            @pl.when((live & size) != 0)
            def _(here: Any = here, first: Any = first, size: int = size) -> None:
                plgpu.copy_smem_to_gmem(
                    staged.at[here],
                    y.at[pl.ds(row + first, size), pl.ds(column, STAGED)],
                )

            first = first + (live & size)
        size //= 2
