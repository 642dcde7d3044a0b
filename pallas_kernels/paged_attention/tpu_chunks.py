"""Chunks on a TPU: rows of several queries, a block of tokens a grid step; see `tpu`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.paged_attention.tpu_block import (
    Block,
    cost,
    pages_of_block,
    scores,
    scratch,
    weighted,
)
from pallas_kernels.paged_attention.tunables import TpuChunks
from pallas_kernels.quantized_pages import Pages, arrays_of, kind_of
from pallas_kernels.ragged import RaggedBatch
from pallas_kernels.tuning import tuned


def chunks(
    q_TKGW: Array,
    pages: Pages,
    layer: Array,
    batch: RaggedBatch,
    score: Score,
    sinks: Float[Array, "K G"] | None,
    interpret: Any,
) -> Float[Array, "T K G W"]:
    """Rows of more than one query; other tokens give zeros."""
    num_tokens, heads, groups, width = q_TKGW.shape
    chosen = tuned(TpuChunks)
    query_block = chosen.query_block
    num_blocks = -(-num_tokens // query_block)
    size = query_block * groups
    q_KXW = jnp.pad(q_TKGW, ((0, num_blocks * query_block - num_tokens), *((0, 0),) * 3))
    q_KXW = q_KXW.transpose(1, 0, 2, 3).reshape(heads, num_blocks * size, width)
    first_tokens = jnp.arange(num_blocks, dtype=jnp.int32) * query_block
    first_rows = jnp.searchsorted(batch.query_starts[1:], first_tokens, side="right")
    block = pl.BlockSpec((heads, size, width), lambda i, *_: (0, i, 0))
    held = arrays_of(pages)
    tops, top_specs = [], []
    if sinks is not None:
        tops = [jnp.tile(sinks, (1, query_block))[..., None]]
        top_specs = [pl.BlockSpec(tops[0].shape, lambda *_: (0, 0, 0))]
    out = pl.pallas_call(
        functools.partial(
            _kernel, kind=kind_of(pages), groups=groups, score=score, has_sinks=bool(tops)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_blocks,),
            in_specs=[block, (pl.BlockSpec(memory_space=pl.ANY),) * len(held), *top_specs],
            out_specs=block,
            scratch_shapes=[
                *scratch(pages, pages_of_block(pages, chosen.positions)),
                pltpu.VMEM((heads, size, 1), jnp.float32),
                pltpu.VMEM((heads, size, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_KXW.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(pages, batch, num_tokens, heads * groups),
        interpret=interpret,
        name="paged_attention_chunks",
    )(
        layer,
        first_rows.astype(jnp.int32),
        batch.query_starts,
        batch.context_lens,
        batch.page_table,
        q_KXW,
        held,
        *tops,
    )
    out = out.reshape(heads, -1, groups, width).transpose(1, 0, 2, 3)
    return out[:num_tokens]


def _kernel(
    layer, first_rows, starts, lens, table, q_ref, held, *refs,
    kind: str, groups: int, score: Score, has_sinks: bool,
) -> None:  # fmt: skip
    """One block of tokens; `out_ref` is the accumulator until the end."""
    tops, (out_ref, buffers, semaphores, m_ref, total_ref) = refs[:has_sinks], refs[has_sinks:]
    index = pl.program_id(0)
    block = Block(held, table, layer[0], buffers, semaphores, kind)
    _, size, width = q_ref.shape
    num_rows = lens.shape[0]
    query_block = size // groups
    first_token, end_token = index * query_block, (index + 1) * query_block
    m_ref[...] = tops[0][...] if tops else jnp.full(m_ref.shape, LOWEST, jnp.float32)
    total_ref[...] = jnp.full(total_ref.shape, float(has_sinks), jnp.float32)
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
            for head, (k_scales, v_scales) in enumerate(block.scales(slot)):
                k, v = block.keys_and_values(slot, head, width)
                s = scores(q_ref[head], k, visible, score, k_scales)
                m = m_ref[head]
                top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
                p = jnp.where(visible, jnp.exp(s - top), 0.0)
                fade = jnp.exp(m - top)
                m_ref[head] = top
                total_ref[head] = total_ref[head] * fade + jnp.sum(p, axis=1, keepdims=True)
                out_ref[head] = out_ref[head] * fade + weighted(p, v, visible, v_scales)

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
