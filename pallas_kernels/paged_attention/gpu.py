"""Paged attention for NVIDIA Hopper, in Pallas (Mosaic GPU).

Math: flash attention (arXiv 2307.08691): an online softmax over blocks of positions, in log2; with
    sinks, the softmax begins with a score that has no value.

Shapes: q [T, N, H]; pages [L, P, K, Z, 2H] in global memory, a key before its value. G = N / K
    query heads share a KV head.

Grid: two kernels, and a rows' kind decides which has it (drawn in the files):

    gpu_decode   rows of one query: (split of the context, KV head, row). The G queries of a head
                 fill rows of one wgmma of 64, the rest of which is wasted and costs no bytes.
    gpu_chunks   rows of more, or a row alone: (query head, tile of 128 tokens).

    In both, one warpgroup keeps TMA copies of pages under way and two compute; positions arrive
    swizzled as wgmma wants them. Decode copies a page's keys and values together, chunks each half
    into a ring of its own. Codes bring their scales by two more copies a page, and are widened by
    the computing warpgroup into shared memory of its own.

Traffic: decode reads a row's visible pages once, and where a context is split writes and reads a
    partial result of each split in float32; chunks read them once for each tile and query head, of
    which the L2 cache takes all but one a group. See traffic.py.

Numerics: products of bfloat16 with float32 accumulation, softmax in float32 with the hardware's
    exp2; weights are rounded to bfloat16 before they multiply the values. Codes are widened to
    bfloat16, which holds all of them; scores are multiplied by their keys' scales, and weights by
    their values', in float32.

Limits: bfloat16 or float16 queries and pages (Hopper multiplies float32 only rounded to tf32), or
    codes; H a multiple of 16 up to 128, or 192 or 256 but of codes; Z a power of two, at least 8.
    The interpreter takes wgmma's operands from shared memory only and stores to no accumulator, so
    there the weights, and the sums of chunks, are in shared memory.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.hopper import ROWS
from pallas_kernels.paged_attention.gpu_block import COLUMNS, LOG2_E, operand_dtype
from pallas_kernels.paged_attention.gpu_chunks import chunks
from pallas_kernels.paged_attention.gpu_decode import TILE, decode
from pallas_kernels.paged_attention.score import Score
from pallas_kernels.quantized_pages import Pages, QuantizedPages, arrays_of, is_quantized
from pallas_kernels.ragged import RaggedBatch

DTYPES = ("bfloat16", "float16", "int8", "float8_e4m3fn")
MAX_HEAD_DIM, MAX_HEAD_DIM_OF_CODES = 256, 128
#: bfloat16 columns that the widest swizzle keeps together.
COLUMNS_OF_A_SWIZZLE = 64


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run with such pages; None where it can."""
    name = jnp.dtype(dtype).name
    if name == "float32":
        return "pages are float32, which Hopper multiplies only rounded to tf32"
    if name not in DTYPES:
        return f"pages are {name}, the kernel takes {', '.join(DTYPES)}"
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is no multiple of 16 up to {MAX_HEAD_DIM}"
    if head_dim > COLUMNS and head_dim % COLUMNS_OF_A_SWIZZLE:
        return (
            f"head_dim {head_dim} is beyond {COLUMNS} and no multiple of {COLUMNS_OF_A_SWIZZLE}: "
            "its second product would begin inside of a swizzled tile"
        )
    if is_quantized(name) and head_dim > MAX_HEAD_DIM_OF_CODES:
        return (
            f"pages are {name} and head_dim is {head_dim}, beyond {MAX_HEAD_DIM_OF_CODES}: shared "
            "memory does not hold codes and widened codes beside the result"
        )
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
    interpret: Any = None,
) -> Float[Array, "T N H"]:
    """See `api.paged_attention`.

    Args:
        interpret: `plgpu.InterpretGPUParams()` where there is no GPU.
    """
    return _attend(q, None, pages, layer, batch, scale, window, soft_cap, sinks, interpret)[0]


def writes(batch: RaggedBatch, pages: Pages, num_heads: int) -> bool:
    """Whether `write_and_attend` takes such a batch and such pages."""
    is_one_group = num_heads // pages.shape[2] <= ROWS
    return batch.aligned and is_one_group and not isinstance(pages, QuantizedPages)


def write_and_attend(
    q: Float[Array, "T N H"],
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "T N H"], Pages]:
    """See `api.write_and_attend`; for what `writes` says."""
    new = jnp.stack([k_new, v_new], axis=2)
    return _attend(q, new, pages, layer, batch, scale, window, soft_cap, sinks, interpret)


def _attend(
    q: Float[Array, "T N H"],
    new_TKIH: Float[Array, "T K 2 H"] | None,
    pages: Pages,
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "N"] | None,
    interpret: Any,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Both: decoding rows' keys and values are written where they are given."""
    num_tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, width = pages.shape
    if width != 2 * head_dim or page_size < TILE or page_size & (page_size - 1):
        raise UnsupportedKernel(
            f"paged_attention backend='gpu': pages {pages.shape} with heads of {head_dim}: a row "
            f"must be twice a head, and the page size a power of two, at least {TILE}"
        )
    score = Score(scale, window, soft_cap)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    held = q.astype(operand_dtype(pages))
    sinks = None if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    max_pages = batch.page_table.shape[1]

    def cost(num_queries: int) -> pl.CostEstimate:
        """As if every row filled its page table and every query saw half of it."""
        scored = num_queries * max_pages * page_size // 2
        page_bytes = sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in arrays_of(pages))
        return pl.CostEstimate(
            flops=4 * scored * num_heads * head_dim,
            transcendentals=scored * num_heads,
            bytes_accessed=batch.page_table.size * page_bytes,
        )

    with jax.named_scope("paged_attention"):
        if batch.context_lens.shape[0] == 1 and batch.max_query_len > 1 and not batch.aligned:
            # A prompt alone: what it may have of one token is a tile, not a kernel more.
            out = chunks(held, pages, layer, batch, score, sinks, cost(num_tokens), interpret, 1)
            return out.astype(q.dtype), pages
        single = batch.query_lens == 1
        first_tokens = jnp.minimum(batch.query_starts[:-1], num_tokens - 1)
        queries = held if batch.aligned else held[first_tokens]
        ends = jnp.where(single, batch.context_lens, 0)
        begins = jnp.zeros_like(ends) if window is None else jnp.maximum(ends - window, 0)
        decoded, pages = decode(
            _grouped(queries, num_kv_heads),
            pages,
            layer,
            batch.page_table,
            begins,
            ends,
            None if sinks is None else _grouped(sinks[None, :, None], num_kv_heads)[0, ..., 0],
            score,
            cost(single.shape[0]),
            interpret,
            None if new_TKIH is None else new_TKIH.astype(held.dtype),
        )
        decoded = _ungrouped(decoded, num_heads, num_kv_heads)
        if batch.aligned:
            out = decoded
        elif batch.max_query_len == 1:
            live = batch.live_tokens(num_tokens)[:, None, None]
            out = jnp.where(live, decoded[batch.token_rows(num_tokens)], 0)
        else:
            out = chunks(held, pages, layer, batch, score, sinks, cost(num_tokens), interpret)
            targets = jnp.where(single, first_tokens, num_tokens)
            out = out.at[targets].set(decoded, mode="drop")
        return out.astype(q.dtype), pages


def _grouped(x_RNH: Float[Array, "R N H"], num_kv_heads: int) -> Float[Array, "R X G H"]:
    """Query heads as they fill the rows of wgmmas: each KV head's in one group or several."""
    num_rows, num_heads, head_dim = x_RNH.shape
    per_kv = num_heads // num_kv_heads
    per_head = -(-per_kv // ROWS)
    own = -(-per_kv // per_head)
    x = x_RNH.reshape(num_rows, num_kv_heads, per_kv, head_dim)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, per_head * own - per_kv), (0, 0)))
    return x.reshape(num_rows, num_kv_heads * per_head, own, head_dim)


def _ungrouped(
    x_RXGH: Float[Array, "R X G H"], num_heads: int, num_kv_heads: int
) -> Float[Array, "R N H"]:
    """The way back from `_grouped`."""
    num_rows, head_dim = x_RXGH.shape[0], x_RXGH.shape[3]
    x = x_RXGH.reshape(num_rows, num_kv_heads, -1, head_dim)[:, :, : num_heads // num_kv_heads]
    return x.reshape(num_rows, num_heads, head_dim)
