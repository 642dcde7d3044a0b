"""Products with 4-bit codes for NVIDIA Hopper, in Pallas (Mosaic GPU), for few tokens.

Math: y = x w with w[k, n] = code[k, n] * scale[k / GROUP, n] + minimum[k / GROUP, n].

Shapes: x [T, K]; codes [K, N] as they lie, two columns a byte; scales and minima [K / GROUP, N].

Grid: (split of K, block of columns). One warpgroup copies, two compute, half of the columns each:

    codes, scales, minima ──TMA──▶ │ slot 0 │ slot 1 │ … │  a ring in shared memory,
    x                     ──TMA──▶ │        │        │   │  DEPTH of K a slot
                                   │ registers: code → weight in bfloat16
                                   ▼
                   a tile [DEPTH, columns] in shared memory, as wgmma takes it
                                   │ wgmma: x [64, DEPTH] × tile, while the next one is widened
                                   ▼
                   sums in registers, float32, at the end to memory: one result a split

    K is split until the blocks of threads fill the 132 processors; XLA adds up the splits' sums.

    A thread widens eight columns of rows of one group: it reads their scales and minima once, and
    all arithmetic is in pairs of bfloat16. Bound by instructions rather than by memory, the kernel
    is as fast as they are few.

Traffic: the codes, scales and minima once; x once for each block of columns, from the L2 cache; the
    splits' sums in float32 twice. See traffic.py.

Numerics: sums in float32. A weight is computed in bfloat16 as (code - 8) * scale + middle, where
    middle = minimum + 8 scale, and so rounded at most three times, a thirtieth of what its code
    rounds away.

Limits: bfloat16, T up to MAX_TOKENS, K in whole DEPTHs, N in whole blocks of columns. Beyond, the
    matmul is bound by arithmetic, and XLA's is as good.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt4

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.hopper import PROCESSORS, accumulator, ahead, estimated, swizzled
from pallas_kernels.quant_matmul.api import GROUP
from pallas_kernels.quant_matmul.tunables import GpuInt4
from pallas_kernels.tuning import tuned

#: Rows of a wgmma, some of which may be padding.
MAX_TOKENS = 64
#: Of K, what a slot of the ring holds.
DEPTH = 64
COMPUTERS = 2
#: Columns that one warpgroup computes.
_WIDE = 128
#: Columns of a block of threads.
COLUMNS = COMPUTERS * _WIDE
_SLOT_BYTES = DEPTH * (COLUMNS // 2 + 2 * MAX_TOKENS) + 2 * DEPTH // GROUP * COLUMNS * 2
#: Tiles of a warpgroup: while one is multiplied, the next one is widened.
_BUFFERS = 2
#: Rows of a tile of shared memory.
_TILE = 8
#: A row of a block's codes is as wide as a swizzle.
_CODES = (
    plgpu.TilingTransform((_TILE, _WIDE)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(_WIDE // 2),  # pyright: ignore[reportAbstractUsage]
)
#: What starting and ending a block of threads costs, in slots. At the sizes of Llama 3 8B's
#: products anything from 1 to 16 gives the same splits.
_START = 4
#: A group's codes in registers: a thread has eight columns of every eighth row. Rows are dealt to
#: lanes and warps so that no two lanes read or write the same bank of shared memory.
_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (4, 128), (2, 64), (8,))),
    warp_dims=(-5, -4),
    lane_dims=(-7, -3, -2),
    vector_dim=-1,
)


def int4_matmul(
    x: Float[Array, "T K"],
    codes: UInt4[Array, "K *out"],
    scale: Float[Array, "G *out"],
    minimum: Float[Array, "G *out"],
    interpret: Any = None,
) -> Float[Array, "T *out"]:
    """See `api.int4_matmul`.

    Args:
        interpret: `plgpu.InterpretGPUParams()` where there is no GPU.

    Raises:
        UnsupportedKernel: sizes or dtypes beyond the limits.
    """
    num_tokens, depth, num_columns = x.shape[0], codes.shape[0], math.prod(codes.shape[1:])
    reason = unsupported(num_tokens, depth, num_columns, x.dtype)
    if reason is None and not scale.dtype == minimum.dtype == jnp.bfloat16:
        reason = f"scales are {scale.dtype} and minima {minimum.dtype}, the kernel takes bfloat16"
    if reason is not None:
        raise UnsupportedKernel(f"int4_matmul backend='gpu': {reason}")
    rows = -(-num_tokens // _TILE) * _TILE
    splits = num_splits(depth, num_columns, rows)
    slots = tuned(GpuInt4).ring_bytes // _SLOT_BYTES
    x = jnp.pad(x, ((0, rows - num_tokens), (0, 0)))
    signed = lax.bitcast_convert_type(codes.reshape(depth, num_columns), jnp.int4)
    groups = [values.reshape(-1, num_columns) for values in (scale, minimum)]
    some = plgpu.SMEM((slots, DEPTH // GROUP, COLUMNS), jnp.bfloat16)
    cost = pl.CostEstimate(
        flops=2 * rows * depth * num_columns,
        transcendentals=0,
        bytes_accessed=depth * num_columns // 2 + 4 * groups[0].size,
    )
    sums = plgpu.kernel(
        functools.partial(_kernel, share=-(-(depth // DEPTH) // splits)),
        out_type=jax.ShapeDtypeStruct((splits, rows, num_columns), jnp.float32),
        scratch_types=(
            swizzled((slots, MAX_TOKENS, DEPTH), DEPTH, x.dtype),
            plgpu.SMEM((slots, DEPTH, COLUMNS), jnp.int4, transforms=_CODES),
            some,
            some,
            swizzled((COMPUTERS * _BUFFERS, DEPTH, _WIDE), _WIDE, x.dtype),
            swizzled((COMPUTERS, MAX_TOKENS, _WIDE), _WIDE, jnp.float32),
            plgpu.Barrier(num_arrivals=4, num_barriers=slots),
            plgpu.Barrier(num_arrivals=COMPUTERS, num_barriers=slots),
        ),
        grid=(splits, num_columns // COLUMNS),
        grid_names=("split", "block"),
        num_threads=COMPUTERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        **estimated(cost),
    )(x, signed, *groups)
    return sums.sum(0)[:num_tokens].astype(x.dtype).reshape(num_tokens, *codes.shape[1:])


def unsupported(num_tokens: int, depth: int, num_columns: int, dtype: Any) -> str | None:
    """Why it cannot multiply so; None where it can."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype).name}, the kernel takes bfloat16"
    if not 0 < num_tokens <= MAX_TOKENS:
        return f"{num_tokens} tokens, the kernel takes 1 to {MAX_TOKENS}"
    if depth % DEPTH:
        return f"K is {depth}, no multiple of {DEPTH}"
    if num_columns % COLUMNS:
        return f"N is {num_columns}, no multiple of {COLUMNS}"
    return None


def num_splits(depth: int, num_columns: int, num_tokens: int) -> int:
    """Splits of K that keep the processors busy and the splits' sums few."""
    slots, blocks = depth // DEPTH, num_columns // COLUMNS

    def moved(splits: int) -> float:
        """Bytes that could be moved meanwhile, with those of the sums, written and read."""
        rounds = -(-blocks * splits // PROCESSORS)
        busy = rounds * (-(-slots // splits) + _START) * PROCESSORS * DEPTH * COLUMNS / 2
        return busy + splits * 2 * 4 * num_tokens * num_columns

    return min(range(1, slots + 1), key=moved)


def _kernel(x, codes, scales, minima, out, *refs, share: int) -> None:
    x_ring, ring, scale_ring, minimum_ring, staging, out_smem, ready, free = refs
    rows, slots = x.shape[0], ring.shape[0]
    split, column = lax.axis_index("split"), lax.axis_index("block") * COLUMNS
    warpgroup = lax.axis_index("warpgroup")
    first = split * share
    count = jnp.clip(codes.shape[0] // DEPTH - first, 0, share)

    @pl.when(warpgroup == COMPUTERS)
    def _() -> None:
        columns = pl.ds(column, COLUMNS)

        def load(i: Any, slot: Any) -> None:
            place, ready_now = first + i, ready.at[slot]
            depth = pl.ds(place * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(codes.at[depth, columns], ring.at[slot], ready_now)
            plgpu.copy_gmem_to_smem(x.at[:, depth], x_ring.at[slot, pl.ds(0, rows)], ready_now)
            some = pl.ds(place * (DEPTH // GROUP), DEPTH // GROUP)
            for values, values_ring in ((scales, scale_ring), (minima, minimum_ring)):
                plgpu.copy_gmem_to_smem(values.at[some, columns], values_ring.at[slot], ready_now)

        ahead(count, slots, free, load)

    own = pl.ds(warpgroup * _WIDE, _WIDE)

    def multiply(total: Any) -> None:
        def step(i: Any, _: None) -> None:
            slot = lax.rem(i, jnp.int32(slots))
            plgpu.barrier_wait(ready.at[slot])
            tiles = [
                _widened(
                    ring.at[slot, pl.ds(group * GROUP, GROUP), own],
                    scale_ring.at[slot, group, own],
                    minimum_ring.at[slot, group, own],
                )
                for group in range(DEPTH // GROUP)
            ]
            plgpu.wgmma_wait(1)  # a store then waits for all warps: none reads the tile any more
            buffer = warpgroup * _BUFFERS + lax.rem(i, jnp.int32(_BUFFERS))
            for group, tile in enumerate(tiles):
                staging[buffer, group * GROUP : (group + 1) * GROUP] = tile
            plgpu.commit_smem()
            pl.when(i > 1)(lambda: release(i - 2))
            plgpu.wgmma(total, x_ring.at[slot], staging.at[buffer])

        def release(i: Any) -> None:
            plgpu.barrier_arrive(free.at[lax.rem(i, jnp.int32(slots))])

        lax.fori_loop(0, count, step, None)
        plgpu.wgmma_wait(0)
        pl.when(count > 1)(lambda: release(count - 2))
        pl.when(count > 0)(lambda: release(count - 1))
        out_smem[warpgroup] = total[...]
        plgpu.commit_smem()
        place = pl.ds(column + warpgroup * _WIDE, _WIDE)
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, pl.ds(0, rows)], out.at[split, :, place])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < COMPUTERS)
    def _() -> None:
        pl.run_scoped(multiply, accumulator(MAX_TOKENS, _WIDE))


def _widened(codes: Any, scales: Any, minima: Any) -> Float[Array, "G W"]:
    """The weights that a group of codes stands for, in bfloat16.

    Args:
        codes: shared memory [GROUP, W], unsigned, held as signed.
        scales, minima: shared memory [W].
    """
    # With its highest bit turned over, as a signed number, a code is code - 8.
    centred = plgpu.load(codes, layout=_LAYOUT, optimized=False) ^ jnp.int4(-8)
    scale, minimum = (
        plgpu.load(values, layout=_LAYOUT.reduce(0), optimized=False) for values in (scales, minima)
    )
    scale, middle = (
        lax.broadcast_in_dim(values, centred.shape, [1]) for values in (scale, minimum + 8 * scale)
    )
    return centred.astype(jnp.bfloat16) * scale + middle
