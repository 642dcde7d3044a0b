"""lora_matmul for NVIDIA Hopper, in Pallas (Mosaic GPU): tokens stay in their own order.

Math: see `api`. A product on Hopper has 64 rows whatever is in them, so nothing is gained by
    sorting tokens first: a tile of 64 tokens is multiplied by the matrices of each slot that has
    tokens in it, and each token keeps the row of its own slot:
    z[t] = (x[tile] a[layer, s]^T)[t] and y[t] += (z[tile] b[layer, s])[t], where s is t's slot.

Shapes: x [T, K]; a [L, S, P R, K], b [L, S, R, N]; y [T, N], changed in place. Tiles as
    `blocks.TokenTiles` lists them, once a step.

Grid: two kernels, and between them XLA adds up the first one's parts.

    gpu_shrink   (part of K, columns of z, tile): z of a tile, of one part of K, in float32
    gpu_expand   (columns of y, tile): adds to a tile of y in place

    In both, one warpgroup keeps TMA copies of the slots' matrices under way in a ring and one
    multiplies; a tile's tokens come once, whatever the number of its slots. Drawn in the files. A
    tile in which no token has an adapter of the class ends at once and leaves y as it is: nothing
    is decided on the host, which `lax.cond` on a GPU would wait for.

Traffic: a and b of each adapter, once for each tile that it has tokens in (all but the first from
    the L2 cache), x once for every 128 columns of z, y in and out of tiles with adapters; the parts
    of z in and out, splits × T × P R of float32. See `gpu_plan.shrink_bytes`, `expand_bytes`.

Numerics: products accumulated in float32, first within a part of K, then over the parts in order;
    z is rounded to x's dtype; y is added in float32 and rounded once. A token's bits depend on
    neither its company nor its place. What is not a number stays in its own row.

Limits: bfloat16 or float16, x and weights alike (Hopper multiplies float32 only rounded to tf32); K
    and the parts' widths multiples of 64; ranks multiples of 8 up to 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.lora_matmul.api import LoraWeights
from pallas_kernels.lora_matmul.blocks import TokenBlocks
from pallas_kernels.lora_matmul.gpu_expand import expand
from pallas_kernels.lora_matmul.gpu_plan import (
    DEPTH_MULTIPLE,
    MAX_RANK,
    RANK_MULTIPLE,
    operand_rank,
)
from pallas_kernels.lora_matmul.gpu_shrink import shrink


def unsupported(
    *, depths: Sequence[int], widths: Sequence[int], ranks: Sequence[int], dtype: DTypeLike
) -> str | None:
    """Why it cannot run with such arrays; None where it can.

    Args:
        depths: K, of each site.
        widths: of the parts.
        ranks: of the classes.
    """
    name = jnp.dtype(dtype).name
    if name not in hopper.DTYPES:
        return f"it multiplies {' and '.join(hopper.DTYPES)}, not {name}"
    odd = [str(size) for size in (*depths, *widths) if size % DEPTH_MULTIPLE]
    if odd:
        return f"sizes of {', '.join(odd)} are no multiples of {DEPTH_MULTIPLE}"
    odd = [str(rank) for rank in ranks if rank % RANK_MULTIPLE or rank > MAX_RANK]
    if odd:
        return (
            f"ranks of {', '.join(odd)} are no multiples of {RANK_MULTIPLE} of at most {MAX_RANK}"
        )
    return None


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
    interpret: Any = None,
) -> Float[Array, "T N"]:
    """See `api.lora_matmul`.

    Args:
        precision: of no effect: products of 16 bits are exact in float32.
        interpret: `plgpu.InterpretGPUParams()` where there is no GPU.
    """
    del precision
    reason = unsupported(
        depths=x.shape[1:], widths=cycle, ranks=[own.b.shape[2] for own in weights], dtype=x.dtype
    )
    kinds = {x.dtype, y.dtype, *(array.dtype for own in weights for array in (own.a, own.b))}
    if reason is None and len(kinds) > 1:
        reason = f"arrays are {', '.join(sorted(map(str, kinds)))}, which must be alike"
    if reason is not None:
        raise UnsupportedKernel(f"lora_matmul backend='gpu': {reason}")
    # Rows of eight: what a tile of shared memory has.
    rows = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
    layer = layer.reshape(1)
    # Each class adds to the same y, which is a reference meanwhile, so that no copy is made.
    target = jax.new_ref(y)
    for own, grouped in zip(weights, blocks, strict=True):
        parts, rank = len(cycle), own.b.shape[2]
        tiles = grouped.tiles
        z = jnp.sum(shrink(rows, own.a, tiles, layer, interpret), axis=0)
        z = (z if reduce is None else reduce(z)).astype(x.dtype)
        # A product's depth is a multiple of 16: what is added is zeros on both sides.
        z = jnp.pad(
            z.reshape(-1, parts, rank), ((0, 0), (0, 0), (0, operand_rank(rank) - rank))
        ).reshape(z.shape[0], -1)
        expand(z, target, own.b, tiles, layer, cycle, interpret)
    return jax.freeze(target)
