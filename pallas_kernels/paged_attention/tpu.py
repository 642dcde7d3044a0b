"""Paged attention for TPUs, in Pallas (Mosaic TPU).

Math: online softmax. For each block of KV positions, with running maximum m, sum l and accumulator
    a: m' = max(m, max s), a = a e^(m-m') + e^(s-m') v, l = l e^(m-m') + Σ e^(s-m'). With sinks
    m and l begin at the head's sink and 1, without at a lowest number and 0.

Shapes: q [T, N, H]; pages [L, P, K, Z, W] in HBM, a key in the first half of a row, its value in
    the second, W a multiple of 128. G = N / K query heads share a KV head. Where half a row is not
    whole registers (H = 64), keys and values are not taken apart: q is followed by zeros, so that
    q·(k, v) is q·k, and of p·(k, v) the second half is kept.

Grid: two calls; rows of one query (decode) and rows of more (chunks) each skip the other's.

    decode    one row a grid step, blocks of positions; the next block's pages, of this row or of
              the next live one, are on their way while a block is computed:

        HBM pages --one copy a page, K heads of Z keys and values--> buffer 0 | buffer 1 (VMEM)
                                            compute  q [K, G] · block      ^ being filled

    chunks    a block of tokens a grid step, for each row that has some of them, blocks of
              positions, double-buffered within the row.

    How many of each is in `tunables`.

Traffic: a row's visible pages once (decode), once a query block (chunks); see traffic.py.

Numerics: products in the pages' dtype with float32 accumulation, softmax in float32; weights are
    rounded to the pages' dtype before they multiply the values. Codes are widened to bfloat16,
    which holds all of them; scores are multiplied by their keys' scales, and weights by their
    values', in float32.

Limits: W a multiple of 128 (`kv_update.page_width`), Z a multiple of 8 (float32), 16 (bfloat16) or
    32 (codes, whose scales come in rows of a multiple of 128, `kv_update.scales_width`);
    the page table fits SMEM (MAX_TABLE_ENTRIES). Page entries past a row's context are not read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.paged_attention.score import Score
from pallas_kernels.paged_attention.tpu_chunks import chunks
from pallas_kernels.paged_attention.tpu_decode import decode
from pallas_kernels.quantized_pages import Pages, QuantizedPages
from pallas_kernels.ragged import RaggedBatch

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
LANES = 128
#: Of the page table in SMEM; 4 bytes each, SMEM has 1 MiB.
MAX_TABLE_ENTRIES = 196_608


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run with such pages; None where it can."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"pages are {jnp.dtype(dtype).name}, the kernel takes {', '.join(DTYPES)}"
    if head_dim % 8:
        return f"head_dim {head_dim} is no multiple of 8"
    return None


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    interpret: Any = False,
) -> Float[Array, "T N H"]:
    """See `api.paged_attention`.

    Args:
        interpret: `pltpu.InterpretParams()` where there is no TPU.
    """
    _check(pages, batch)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = pages.shape[2], pages.shape[4] // 2
    apart = half % LANES == 0
    width = half if apart else 2 * half
    dtype = jnp.bfloat16 if isinstance(pages, QuantizedPages) else pages.dtype
    q_TKGW = q.astype(dtype).reshape(num_tokens, num_kv_heads, -1, head_dim)
    q_TKGW = jnp.pad(q_TKGW, ((0, 0),) * 3 + ((0, width - head_dim),))
    score = Score(scale, window, soft_cap)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1)

    def values(out: Array) -> Array:
        first = 0 if apart else half
        return out[..., first : first + head_dim].reshape(-1, num_heads, head_dim)

    with jax.named_scope("paged_attention"):
        single = batch.query_lens == 1
        rows = batch.token_rows(num_tokens)
        live = batch.live_tokens(num_tokens)[:, None, None]
        first_tokens = jnp.minimum(batch.query_starts[:-1], num_tokens - 1)
        lens = jnp.where(single, batch.context_lens, 0)
        decoded = decode(q_TKGW[first_tokens], pages, layer, lens, batch, score, sinks, interpret)
        out = values(decoded)[rows]
        if batch.max_query_len > 1:
            chunked = values(chunks(q_TKGW, pages, layer, batch, score, sinks, interpret))
            out = jnp.where(single[rows][:, None, None], out, chunked)
        return jnp.where(live, out, 0).astype(q.dtype)


def _check(pages: Pages, batch: RaggedBatch) -> None:
    _, _, _, page_size, width = pages.shape
    sublanes = 32 // pages.dtype.itemsize
    problem = None
    if width % LANES:
        problem = f"a page's row has {width} elements, no multiple of {LANES}: use page_width"
    elif isinstance(pages, QuantizedPages) and pages.scales.shape[-1] % LANES:
        scales = pages.scales.shape[-1]
        problem = f"a row of scales has {scales} elements, no multiple of {LANES}: use scales_width"
    elif page_size % sublanes:
        problem = f"pages of {page_size} {pages.dtype} positions: give a multiple of {sublanes}"
    elif batch.page_table.size > MAX_TABLE_ENTRIES:
        problem = (
            f"a page table of {batch.page_table.shape} is beyond {MAX_TABLE_ENTRIES} entries: "
            "lower max_rows or max_context, or use larger pages"
        )
    if problem is not None:
        raise UnsupportedKernel(f"paged_attention backend='tpu': {problem}")
