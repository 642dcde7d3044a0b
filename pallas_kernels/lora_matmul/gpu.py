"""lora_matmul for NVIDIA Hopper, in Pallas (Mosaic GPU): tokens stay in their own order.

Math: see `api`. A product on Hopper has 64 rows whatever is in them, so nothing is gained by
    sorting tokens first: a tile of 64 tokens is multiplied by the matrices of each slot that has
    tokens in it, and each token keeps the row of its own slot:
    z[t] = (x[tile] a[layer, s]^T)[t] and y[t] += (z[tile] b[layer, s])[t], where s is t's slot.

Shapes: x [T, K]; a [L, S, P R, K], b [L, S, R, N]; y [T, N], changed in place. Tiles as
    `blocks.TokenTiles` lists them, once a step.

Grid: two kernels a class, and nothing between them in a decode step.

    gpu_shrink   (part of K, columns of z, tile): z of a tile, of one part of K, in float32
    gpu_expand   (columns of y, tile): adds the parts up, rounds them, adds to a tile of y in place

    In both, one warpgroup keeps TMA copies of the slots' matrices under way in a ring and the
    others multiply; a tile's tokens come once, whatever the number of its slots. Drawn in the
    files. A tile in which no token has an adapter of the class ends at once and leaves y as it is:
    nothing is decided on the host, which `lax.cond` on a GPU would wait for.

    XLA adds up the parts where devices share K (`reduce`), and where every block of columns would
    read more of them than one kernel is worth (`gpu_plan.expand_adds_up`): in long steps, and of
    some sites of high ranks.

Traffic: a and b of each adapter, once for each tile that it has tokens in (all but the first from
    the L2 cache); x once for each chunk of columns of z and z once for each block of columns of y,
    from there too; y in and out of tiles with adapters. See `gpu_plan.shrink_bytes` and
    `expand_bytes`. Of 64 tokens over 8 adapters of rank 16, at Llama 3 8B's sites, in MB:

                 a      b     y    x, chunks   z, blocks   parts of z   written once
        qkv      3.1    1.6   1.6   3.1   6     3.1   96      8          0.10
        out      1.0    1.0   1.0   1.0   2     4.2   64     16          0.07
        gate_up  2.1    7.3   7.3   2.1   4     3.7  112      8          0.07
        down     3.7    1.0   1.0   3.7   2     3.7   64     14          0.06

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
    expand_adds_up,
    expand_plan,
    padding,
    shrink_plan,
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
    missing = -x.shape[0] % 8
    rows = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    layer = layer.reshape(1)
    # Each class adds to the same y, which is a reference meanwhile, so that no copy is made.
    target = jax.new_ref(y)
    for own, grouped in zip(weights, blocks, strict=True):
        tiles, rank = grouped.tiles, own.b.shape[2]
        (num_tiles, most), sizes = tiles.present.shape, (rank, x.dtype.itemsize)
        first = shrink_plan(num_tiles, x.shape[1], own.a.shape[2], most, x.dtype.itemsize)
        second = expand_plan(num_tiles, y.shape[1], rank, cycle, x.dtype.itemsize)
        z = shrink(rows, own.a, tiles, layer, first, rank, interpret)
        if reduce is not None or not expand_adds_up(first, second, num_tiles, y.shape[1], *sizes):
            total = jnp.sum(z, axis=0)
            total = total if reduce is None else reduce(total)
            # Of an odd number of eights no swizzle of 16 bits begins with every part.
            z = (total if padding(rank) else total.astype(x.dtype))[None]
        expand(z, target, own.b, tiles, layer, cycle, second, interpret)
    return jax.freeze(target)
