"""lora_matmul for TPUs, in Pallas (Mosaic TPU): one step of the grid a block of tokens.

Math: see `api`; for each block u of B tokens of slot s(u),
    z[u] = x[u] a[layer, s(u)]^T                     (B x K) (K x P R)
    d[u] = z[u] b'[layer, s(u)],                     (B x P R) (P R x N)
where b' is b over and over, once for each part, with zeros in the columns of other parts: so all
parts are one product, whose depth P R the matrix unit would fill up anyway.

Shapes: x [U, B, K] gathered by XLA, a [L, S, P R, K], b [L, S, R, N], d [U, B, N] in y's
    dtype.

Grid: blocks, and behind them tiles of COLUMNS of N. Slot and layer are prefetched scalars, by which
the pipeline fetches the next block's matrices while this one is multiplied:

    a[layer, s(u)]  HBM --> VMEM --.            b[layer, s(u)][:, n]  HBM --> VMEM --.
    x[u]            HBM --> VMEM --> z[u]       z[u]                  HBM --> VMEM --> d[u][:, n]

    Blocks of one slot follow each other, so their matrices are fetched once; those behind the last
    block with tokens stay on its blocks, which are not fetched again, and multiply nothing.

Traffic: a and b of each adapter that has tokens once (b once a tile), x, z and d of the blocks.

Numerics: products accumulated in float32; z is rounded to x's dtype between them, and d to y's
    before it is added.

Limits: K and N multiples of 128. One block's a, twice, has to fit VMEM: P R x K up to 8 Mi.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.lora_matmul.api import LoraWeights
from pallas_kernels.lora_matmul.blocks import TokenBlocks
from pallas_kernels.lora_matmul.reference import part_of_column
from pallas_kernels.lora_matmul.xla import put_back, take_rows

LANES = 128
#: Columns of a tile of b, at most.
COLUMNS = 2048
_VMEM_BYTES = 96 << 20


def lora_matmul(
    x: Float[Array, "T K"],
    y: Float[Array, "T N"],
    weights: tuple[LoraWeights, ...],
    blocks: tuple[TokenBlocks, ...],
    layer: Int[Array, ""],
    cycle: tuple[int, ...],
    precision: jax.lax.Precision,
    reduce: Callable[[Array], Array] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "T N"]:
    """See `api.lora_matmul`.

    Args:
        interpret: runs it on any platform, for tests.
    """
    if x.shape[1] % LANES or y.shape[1] % LANES:
        raise UnsupportedKernel(
            f"lora_matmul: K={x.shape[1]} and N={y.shape[1]} must be multiples of {LANES} on a TPU"
        )

    def add(y: Float[Array, "T N"], own: LoraWeights, grouped: TokenBlocks) -> Array:
        scalars = grouped.slots, grouped.num_blocks[None], layer[None]
        z = _shrink(scalars, take_rows(x, grouped), own.a, precision, interpret)
        z = (z if reduce is None else reduce(z)).astype(x.dtype)
        delta = _expand(scalars, z, own.b, cycle, precision, y.dtype, interpret)
        return put_back(y, delta, grouped)

    for own, grouped in zip(weights, blocks, strict=True):
        y = jax.lax.cond(grouped.num_blocks > 0, add, lambda y, *_: y, y, own, grouped)
    return y


def _shrink(
    scalars: tuple[Array, Array, Array],
    rows: Float[Array, "U B K"],
    a: Float[Array, "L S PR K"],
    precision: jax.lax.Precision,
    interpret: bool,
) -> Float[Array, "U B PR"]:
    num_blocks, size, depth = rows.shape
    wide = a.shape[2]

    def kernel(slots, count, layer, x_ref, a_ref, z_ref) -> None:
        @pl.when(pl.program_id(0) < count[0])
        def _() -> None:
            z_ref[...] = jax.lax.dot_general(
                x_ref[...],
                a_ref[...],
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_blocks, size, wide), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_blocks,),
            in_specs=[
                pl.BlockSpec((None, size, depth), lambda u, _, n, __: (_live(u, n), 0, 0)),
                pl.BlockSpec(
                    (None, None, wide, depth), lambda u, slots, _, layer: (layer[0], slots[u], 0, 0)
                ),
            ],
            out_specs=pl.BlockSpec((None, size, wide), lambda u, *_: (u, 0, 0)),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
        interpret=interpret,
    )(*scalars, rows, a)


def _expand(
    scalars: tuple[Array, Array, Array],
    z: Float[Array, "U B PR"],
    b: Float[Array, "L S R N"],
    cycle: tuple[int, ...],
    precision: jax.lax.Precision,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "U B N"]:
    num_blocks, size, wide = z.shape
    rank, columns = b.shape[2:]
    parts = len(cycle)
    tile = next(n for n in range(min(columns, COLUMNS), 0, -LANES) if columns % n == 0)
    part_of = jnp.asarray(part_of_column(cycle, columns), jnp.int32)[None]

    def kernel(slots, count, layer, part_ref, z_ref, b_ref, d_ref) -> None:
        @pl.when(pl.program_id(1) < count[0])
        def _() -> None:
            own = b_ref[...]
            if parts > 1:
                zero = jnp.zeros_like(own)
                own = jnp.concatenate(
                    [jnp.where(part_ref[...] == part, own, zero) for part in range(parts)]
                )
            d_ref[...] = jnp.dot(
                z_ref[...], own, precision=precision, preferred_element_type=jnp.float32
            ).astype(dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_blocks, size, columns), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns // tile, num_blocks),
            in_specs=[
                pl.BlockSpec((1, tile), lambda n, u, *_: (0, n)),
                pl.BlockSpec(
                    (None, size, wide), lambda n, u, _, count, __: (_live(u, count), 0, 0)
                ),
                pl.BlockSpec(
                    (None, None, rank, tile),
                    lambda n, u, slots, _, layer: (layer[0], slots[u], 0, n),
                ),
            ],
            out_specs=pl.BlockSpec((None, size, tile), lambda n, u, *_: (u, 0, n)),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
        interpret=interpret,
    )(*scalars, part_of, z, b)


def _live(block: Int[Array, ""], count: Int[Array, "1"]) -> Int[Array, ""]:
    """The block itself, or the last one that has tokens."""
    return jnp.minimum(block, jnp.maximum(count[0] - 1, 0))
