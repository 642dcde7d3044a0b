"""kv_update for TPUs, in Pallas (Mosaic TPU): tiles of pages are read, changed and written back.

Math: pages[layer, token_pages[t], :, token_offsets[t]] = (key[t], value[t]), each in its half.

Shapes: pages [L, P, K, Z, W] in HBM, W a multiple of 128; a tile is the SUBLANES positions of a
    page that lie in the same registers: 8 of float32, 16 of bfloat16, of all K heads.

Grid: one step a tile. Tokens whose places follow each other within a tile are a run; runs are
    numbered on the device, and each brings its tile through VMEM once:

        tokens  |a|b|c c c c c c c c c|d|pad      runs: a; b; c to its tile's end; the rest of c; d
        step    HBM tile --> VMEM, where(run's positions, new, old) --> the same HBM tile

    Pallas' pipeline fetches the next tile meanwhile. Steps behind the last run stay on one tile of
    the null page, which is not moved again.

Traffic: each run's tile is read and written, K × SUBLANES × W elements, and the new rows once more
    than that, since XLA lays them out as tiles first.

Numerics: a cast to the pages' dtype.

Limits: positions of one tile come together in the token order, and no other row writes to it, as
    in a `RaggedBatch` over pages that rows do not share while they write.

XLA's own scatter is no alternative here: it wants a layout of the pages in which all heads of a
position lie together, the attention kernel one in which a page's positions do, and between the two
XLA copies the whole cache in every layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.kv_update.xla import empty_pages as empty_pages

DTYPES = ("float32", "bfloat16")
LANES = 128


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run with such pages; None where it can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"pages are {name}, the kernel takes {', '.join(DTYPES)}"
    return None


def kv_update(
    pages: Float[Array, "L P K Z W"],
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
    num_rows: int | None = None,
    interpret: Any = False,
) -> Float[Array, "L P K Z W"]:
    """See `api.kv_update`.

    Args:
        interpret: `pltpu.InterpretParams()` where there is no TPU.
    """
    _, _, heads, page_size, width = pages.shape
    num_tokens, _, head_dim = k_new.shape
    sublanes = 32 // pages.dtype.itemsize
    if width % LANES or page_size % sublanes:
        raise UnsupportedKernel(
            f"kv_update backend='tpu': pages {pages.shape} of {pages.dtype}: rows must be a "
            f"multiple of {LANES} (use page_width), pages of {sublanes} positions"
        )
    most = num_tokens
    if num_rows is not None:
        most = max(1, min(num_tokens, num_tokens // sublanes + 2 * num_rows))
    with jax.named_scope("kv_update"):
        starts, lengths, count = _runs(token_pages, token_offsets, sublanes, most)
        offsets = token_offsets[starts] % sublanes
        tokens = starts[:, None] - offsets[:, None] + jnp.arange(sublanes, dtype=jnp.int32)
        tokens = jnp.clip(tokens, 0, num_tokens - 1)
        unused = ((0, 0),) * 3 + ((0, width // 2 - head_dim),)
        halves = (new.astype(pages.dtype)[tokens] for new in (k_new, v_new))
        new = jnp.concatenate([jnp.pad(half, unused) for half in halves], axis=-1)
        tile = pl.BlockSpec(
            (None, None, heads, sublanes, width),
            lambda i, layer, page, part, *_: (layer[0], page[i], 0, part[i], 0),
        )
        live = jnp.arange(most, dtype=jnp.int32) < count
        num_bytes = most * heads * sublanes * width * pages.dtype.itemsize
        return pl.pallas_call(
            _kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=5,
                grid=(most,),
                in_specs=[
                    pl.BlockSpec((None, heads, sublanes, width), lambda i, *_: (i, 0, 0, 0)),
                    tile,
                ],
                out_specs=tile,
            ),
            out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
            input_output_aliases={6: 0},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=3 * num_bytes),
            interpret=interpret,
            name="kv_update",
        )(
            jnp.asarray(layer, jnp.int32).reshape(1),
            jnp.where(live, token_pages[starts], 0),
            jnp.where(live, token_offsets[starts] // sublanes, 0),
            offsets,
            lengths,
            jnp.swapaxes(new, 1, 2),
            pages,
        )


def _runs(
    token_pages: Int[Array, "T"], token_offsets: Int[Array, "T"], sublanes: int, most: int
) -> tuple[Int[Array, "X"], Int[Array, "X"], Int[Array, ""]]:
    """First token and length of each run within a tile, and how many runs there are.

    Args:
        most: X; more runs there must not be.
    """
    num_tokens = token_pages.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    is_live = token_pages > 0
    follows = (token_pages == jnp.roll(token_pages, 1)) & (
        token_offsets == jnp.roll(token_offsets, 1) + 1
    )
    is_first = is_live & ~(follows & (token > 0) & (token_offsets % sublanes > 0))
    run = jnp.cumsum(is_first) - 1
    place = jnp.where(is_first, run, most)
    starts = jnp.zeros(most, jnp.int32).at[place].set(token, mode="drop")
    lengths = jnp.zeros(most, jnp.int32).at[jnp.where(is_live, run, most)].add(1, mode="drop")
    return starts, lengths, run[-1] + 1


def _kernel(layer, page, part, offsets, lengths, new_ref, old_ref, out_ref) -> None:
    index = pl.program_id(0)
    first = offsets[index]
    position = lax.broadcasted_iota(jnp.int32, old_ref.shape, 1)
    is_new = (position >= first) & (position < first + lengths[index])
    out_ref[...] = jnp.where(is_new, new_ref[...], old_ref[...])
