"""Paged attention for TPUs, in Pallas (Mosaic TPU).

Math: online softmax. For each block of KV positions, with running maximum m, sum l and accumulator
    a: m' = max(m, max s), a = a e^(m-m') + e^(s-m') v, l = l e^(m-m') + Σ e^(s-m').

Shapes: q [T, N, H]; pages [L, P, K, Z, W] in HBM, a key in the first half of a row, its value in
    the second, W a multiple of 128. G = N / K query heads share a KV head. Where half a row is not
    whole registers (H = 64), keys and values are not taken apart: q is followed by zeros, so that
    q·(k, v) is q·k, and of p·(k, v) the second half is kept.

Grid: two calls; rows of one query (decode) and rows of more (chunks) each skip the other's.

    decode    one row a grid step, blocks of DECODE_PAGES pages; the next block's pages, of this row
              or of the next live one, are on their way while a block is computed:

        HBM pages --one copy a page, K heads of Z keys and values--> buffer 0 | buffer 1 (VMEM)
                                            compute  q [K, G] · block      ^ being filled

    chunks    QUERY_BLOCK tokens a grid step, for each row that has some of them, blocks of
              PREFILL_PAGES pages, double-buffered within the row.

Traffic: a row's visible pages once (decode), once a query block (chunks); see traffic.py.

Numerics: products in the pages' dtype with float32 accumulation, softmax in float32; weights are
    rounded to the pages' dtype before they multiply the values.

Limits: W a multiple of 128 (`kv_update.page_width`), Z a multiple of 8 (float32) or 16 (bfloat16);
    the page table fits SMEM (MAX_TABLE_ENTRIES). Page entries past a row's context are not read.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.ragged import RaggedBatch

DTYPES = ("float32", "bfloat16")
LANES = 128
DECODE_PAGES = 8
PREFILL_PAGES = 16
QUERY_BLOCK = 64
#: Of the page table in SMEM; 4 bytes each, SMEM has 1 MiB.
MAX_TABLE_ENTRIES = 196_608
_LOWEST = -1e30


class _Score(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run with such pages; None where it can."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"pages are {jnp.dtype(dtype).name}, the kernel takes {', '.join(DTYPES)}"
    if head_dim % 8:
        return f"head_dim {head_dim} is no multiple of 8"
    return None


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Float[Array, "L P K Z W"],
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
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
    q_TKGW = q.astype(pages.dtype).reshape(num_tokens, num_kv_heads, -1, head_dim)
    q_TKGW = jnp.pad(q_TKGW, ((0, 0),) * 3 + ((0, width - head_dim),))
    score = _Score(scale, window, soft_cap)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)

    def values(out: Array) -> Array:
        first = 0 if apart else half
        return out[..., first : first + head_dim].reshape(-1, num_heads, head_dim)

    with jax.named_scope("paged_attention"):
        single = batch.query_lens == 1
        rows = batch.token_rows(num_tokens)
        live = batch.live_tokens(num_tokens)[:, None, None]
        first_tokens = jnp.minimum(batch.query_starts[:-1], num_tokens - 1)
        lens = jnp.where(single, batch.context_lens, 0)
        decoded = _decode(q_TKGW[first_tokens], pages, layer, lens, batch, score, interpret)
        out = values(decoded)[rows]
        if batch.max_query_len > 1:
            chunked = values(_chunks(q_TKGW, pages, layer, batch, score, interpret))
            out = jnp.where(single[rows][:, None, None], out, chunked)
        return jnp.where(live, out, 0).astype(q.dtype)


def _check(pages: Float[Array, "L P K Z W"], batch: RaggedBatch) -> None:
    _, _, _, page_size, width = pages.shape
    sublanes = 32 // pages.dtype.itemsize
    problem = None
    if width % LANES:
        problem = f"a page's row has {width} elements, no multiple of {LANES}: use page_width"
    elif page_size % sublanes:
        problem = f"pages of {page_size} {pages.dtype} positions: give a multiple of {sublanes}"
    elif batch.page_table.size > MAX_TABLE_ENTRIES:
        problem = (
            f"a page table of {batch.page_table.shape} is beyond {MAX_TABLE_ENTRIES} entries: "
            "lower max_rows or max_context, or use larger pages"
        )
    if problem is not None:
        raise UnsupportedKernel(f"paged_attention backend='tpu': {problem}")


# ---------------------------------------------------------------------------- both kernels


class _Block(NamedTuple):
    """Pages that are moved and computed together.

    Attributes:
        pages, table: in HBM, and the page tables of all rows in SMEM.
        buffer, semaphores: two of each.
        num_pages: of a block.
    """

    pages: Any
    table: Any
    layer: Any
    buffer: Any
    semaphores: Any
    num_pages: int

    @property
    def page_size(self) -> int:
        return self.buffer.shape[3]

    @property
    def span(self) -> int:
        """Positions of a block."""
        return self.num_pages * self.page_size

    def copies(self, row: Any, first_page: Any, slot: Any) -> list[Any]:
        """The copies of one block, to be started or waited for; the table's end repeats."""
        last = self.table.shape[1] - 1
        return [
            pltpu.make_async_copy(
                self.pages.at[self.layer, self.table[row, jnp.minimum(first_page + i, last)]],
                self.buffer.at[slot, i],
                self.semaphores.at[slot],
            )
            for i in range(self.num_pages)
        ]

    def blank(self, slot: Any, position: Any, begin: Any, end: Any) -> None:
        """Zeros wherever a block from `position` on is outside begin … end - 1.

        Weights there are 0 already, but what lies there may be NaN.
        """

        @pl.when((position < begin) | (position + self.span > end))
        def _() -> None:
            block = self.buffer[slot]
            shape = (self.num_pages, 1, self.page_size, 1)
            place = position + lax.broadcasted_iota(jnp.int32, shape, 0) * self.page_size
            place = place + lax.broadcasted_iota(jnp.int32, shape, 2)
            inside = jnp.broadcast_to((place >= begin) & (place < end), block.shape)
            self.buffer[slot] = jnp.where(inside, block, jnp.zeros_like(block))

    def keys_and_values(self, slot: Any, head: int, width: int) -> tuple[Array, Array]:
        """Of one KV head, [span, width] each; the same array where they are not taken apart."""
        kv = self.buffer[slot, :, head].reshape(self.span, -1)
        if kv.shape[-1] == width:
            return kv, kv
        return kv[:, :width], kv[:, width:]


def _scores(q_XW: Array, k_SW: Array, visible: Array, score: _Score) -> Array:
    s = lax.dot_general(
        q_XW,
        k_SW,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=_exact(q_XW),
    )
    s = s * score.scale
    if score.soft_cap is not None:
        s = score.soft_cap * jnp.tanh(s / score.soft_cap)
    return jnp.where(visible, s, _LOWEST)


def _exact(x: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def _weighted(p: Array, v_SW: Array) -> Array:
    p = p.astype(v_SW.dtype)
    return lax.dot_general(
        p, v_SW, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32, precision=_exact(p)
    )


def _scratch(pages: Array, num_pages: int) -> list[Any]:
    _, _, heads, page_size, width = pages.shape
    return [
        pltpu.VMEM((2, num_pages, heads, page_size, width), pages.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def _cost(pages: Array, batch: RaggedBatch, num_queries: int, num_heads: int) -> pl.CostEstimate:
    """As if every row filled its page table and every query saw half of it."""
    page_bytes = pages.size // pages.shape[0] // pages.shape[1] * pages.dtype.itemsize
    scored = num_queries * batch.page_table.shape[1] * pages.shape[3] // 2
    return pl.CostEstimate(
        flops=4 * scored * num_heads * (pages.shape[4] // 2),
        transcendentals=scored * num_heads,
        bytes_accessed=batch.page_table.size * page_bytes,
    )


# ---------------------------------------------------------------------------- decode


def _decode(
    q_RKGW: Array,
    pages: Array,
    layer: Array,
    lens: Int[Array, "R"],
    batch: RaggedBatch,
    score: _Score,
    interpret: Any,
) -> Float[Array, "R K G W"]:
    """One query a row; rows of length 0 give zeros."""
    num_rows, heads, groups, width = q_RKGW.shape
    padded = -(-groups // 8) * 8
    q_RKGW = jnp.pad(q_RKGW, ((0, 0), (0, 0), (0, padded - groups), (0, 0)))
    shape = (1, heads, padded, width)
    row_block = pl.BlockSpec(shape, lambda row, *_: (row, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_decode_kernel, score=score),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_rows,),
            in_specs=[row_block, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=row_block,
            scratch_shapes=[*_scratch(pages, DECODE_PAGES), pltpu.SMEM((1,), jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q_RKGW.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=_cost(pages, batch, num_rows, heads * groups),
        interpret=interpret,
        name="paged_attention_decode",
    )(layer, lens, batch.page_table, q_RKGW, pages)
    return out[:, :, :groups]


def _decode_kernel(
    layer, lens, table, q_ref, pages, out_ref, buffer, semaphores, slot_ref, *, score: _Score
) -> None:
    """One row. `slot_ref` holds the buffer that the next block to compute is in."""
    row, num_rows = pl.program_id(0), pl.num_programs(0)
    block = _Block(pages, table, layer[0], buffer, semaphores, DECODE_PAGES)

    def begin_of(row: Any) -> Any:
        return 0 if score.window is None else jnp.maximum(lens[row] - score.window, 0)

    def first_page(row: Any) -> Any:
        return begin_of(row) // block.page_size

    def next_live(row: Any) -> Any:
        def is_dead(row: Any) -> Any:
            return (row < num_rows) & (lens[jnp.minimum(row, num_rows - 1)] == 0)

        return lax.while_loop(is_dead, lambda row: row + 1, row)

    @pl.when(row == 0)
    def _() -> None:
        slot_ref[0] = 0
        first = next_live(0)

        @pl.when(first < num_rows)
        def _() -> None:
            for copy in block.copies(first, first_page(first), 0):
                copy.start()

    end, begin = lens[row], begin_of(row)
    origin = first_page(row) * block.page_size
    num_blocks = pl.cdiv(end - origin, block.span)
    heads, groups, width = q_ref.shape[1:]

    def body(index: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slot = slot_ref[0]
        is_last = index + 1 == num_blocks
        next_row = jnp.where(is_last, next_live(row + 1), row)

        @pl.when(next_row < num_rows)
        def _() -> None:
            page = first_page(next_row) + jnp.where(is_last, 0, (index + 1) * block.num_pages)
            for copy in block.copies(next_row, page, 1 - slot):
                copy.start()

        for copy in block.copies(row, first_page(row) + index * block.num_pages, slot):
            copy.wait()
        slot_ref[0] = 1 - slot
        position = origin + index * block.span
        block.blank(slot, position, begin, end)
        place = position + lax.broadcasted_iota(jnp.int32, (1, block.span), 1)
        visible = (place >= begin) & (place < end)
        m, total, acc = carry
        parts = []
        for head in range(heads):
            k, v = block.keys_and_values(slot, head, width)
            s = _scores(q_ref[0, head], k, visible, score)
            top = jnp.maximum(m[head], jnp.max(s, axis=1, keepdims=True))
            p = jnp.where(visible, jnp.exp(s - top), 0.0)
            fade = jnp.exp(m[head] - top)
            summed = total[head] * fade + jnp.sum(p, axis=1, keepdims=True)
            parts.append((top, summed, acc[head] * fade + _weighted(p, v)))
        tops, sums, accs = zip(*parts, strict=True)
        return jnp.stack(tops), jnp.stack(sums), jnp.stack(accs)

    empty = jnp.full((heads, groups, 1), _LOWEST, jnp.float32)
    acc = jnp.zeros((heads, groups, width), jnp.float32)
    _, total, acc = lax.fori_loop(0, num_blocks, body, (empty, jnp.zeros_like(empty), acc))
    out_ref[0] = acc / jnp.where(total > 0, total, 1.0)


# ---------------------------------------------------------------------------- chunks


def _chunks(
    q_TKGW: Array, pages: Array, layer: Array, batch: RaggedBatch, score: _Score, interpret: Any
) -> Float[Array, "T K G W"]:
    """Rows of more than one query; other tokens give zeros."""
    num_tokens, heads, groups, width = q_TKGW.shape
    num_blocks = -(-num_tokens // QUERY_BLOCK)
    size = QUERY_BLOCK * groups
    q_KXW = jnp.pad(q_TKGW, ((0, num_blocks * QUERY_BLOCK - num_tokens), *((0, 0),) * 3))
    q_KXW = q_KXW.transpose(1, 0, 2, 3).reshape(heads, num_blocks * size, width)
    first_tokens = jnp.arange(num_blocks, dtype=jnp.int32) * QUERY_BLOCK
    first_rows = jnp.searchsorted(batch.query_starts[1:], first_tokens, side="right")
    block = pl.BlockSpec((heads, size, width), lambda i, *_: (0, i, 0))
    out = pl.pallas_call(
        functools.partial(_chunks_kernel, groups=groups, score=score),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_blocks,),
            in_specs=[block, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=block,
            scratch_shapes=[
                *_scratch(pages, PREFILL_PAGES),
                pltpu.VMEM((heads, size, 1), jnp.float32),
                pltpu.VMEM((heads, size, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_KXW.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=_cost(pages, batch, num_tokens, heads * groups),
        interpret=interpret,
        name="paged_attention_chunks",
    )(
        layer,
        first_rows.astype(jnp.int32),
        batch.query_starts,
        batch.context_lens,
        batch.page_table,
        q_KXW,
        pages,
    )
    out = out.reshape(heads, -1, groups, width).transpose(1, 0, 2, 3)
    return out[:num_tokens]


def _chunks_kernel(
    layer, first_rows, starts, lens, table, q_ref, pages, out_ref,
    buffer, semaphores, m_ref, total_ref, *, groups: int, score: _Score,
) -> None:  # fmt: skip
    """One block of tokens; `out_ref` is the accumulator until the end."""
    index = pl.program_id(0)
    block = _Block(pages, table, layer[0], buffer, semaphores, PREFILL_PAGES)
    heads, size, width = q_ref.shape
    num_rows = lens.shape[0]
    first_token, end_token = index * QUERY_BLOCK, (index + 1) * QUERY_BLOCK
    m_ref[...] = jnp.full(m_ref.shape, _LOWEST, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    def attend(row: Any) -> None:
        """The tokens of one row that are in this block."""
        begin = jnp.maximum(starts[row], first_token)
        end = jnp.minimum(starts[row + 1], end_token)
        offset = lens[row] - starts[row + 1]  # a token's position is offset + token
        kv_end = offset + end
        kv_begin = 0
        if score.window is not None:
            kv_begin = jnp.maximum(offset + begin - score.window + 1, 0)
        first_page = kv_begin // block.page_size
        origin = first_page * block.page_size
        num_blocks = pl.cdiv(kv_end - origin, block.span)
        token = first_token + lax.broadcasted_iota(jnp.int32, (size, 1), 0) // groups
        mine = (token >= begin) & (token < end)
        query = offset + token
        for copy in block.copies(row, first_page, 0):
            copy.start()

        def body(i: Any, _: None) -> None:
            slot = i % 2

            @pl.when(i + 1 < num_blocks)
            def _() -> None:
                for copy in block.copies(row, first_page + (i + 1) * block.num_pages, 1 - slot):
                    copy.start()

            for copy in block.copies(row, first_page + i * block.num_pages, slot):
                copy.wait()
            position = origin + i * block.span
            block.blank(slot, position, kv_begin, kv_end)
            place = position + lax.broadcasted_iota(jnp.int32, (1, block.span), 1)
            visible = mine & (place <= query)
            if score.window is not None:
                visible = visible & (place > query - score.window)
            for head in range(heads):
                k, v = block.keys_and_values(slot, head, width)
                s = _scores(q_ref[head], k, visible, score)
                m = m_ref[head]
                top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
                p = jnp.where(visible, jnp.exp(s - top), 0.0)
                fade = jnp.exp(m - top)
                m_ref[head] = top
                total_ref[head] = total_ref[head] * fade + jnp.sum(p, axis=1, keepdims=True)
                out_ref[head] = out_ref[head] * fade + _weighted(p, v)

        lax.fori_loop(0, num_blocks, body, None)

    def visit(row: Any) -> Any:
        length = starts[row + 1] - starts[row]
        pl.when(length > 1)(lambda: attend(row))
        return row + 1

    def is_inside(row: Any) -> Any:
        return (row < num_rows) & (starts[jnp.minimum(row, num_rows - 1)] < end_token)

    lax.while_loop(is_inside, visit, first_rows[index])
    total = total_ref[...]
    out_ref[...] = out_ref[...] / jnp.where(total > 0, total, 1.0)
