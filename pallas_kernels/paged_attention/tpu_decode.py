"""Decode on a TPU: rows of one query, one a grid step; see `tpu`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.paged_attention.tpu_block import (
    Block,
    cost,
    pages_of_block,
    scores,
    scratch,
    weighted,
)
from pallas_kernels.paged_attention.tunables import TpuDecode
from pallas_kernels.quantized_pages import Pages, arrays_of, kind_of
from pallas_kernels.ragged import RaggedBatch
from pallas_kernels.tuning import tuned


def decode(
    q_RKGW: Array,
    pages: Pages,
    layer: Array,
    lens: Int[Array, "R"],
    batch: RaggedBatch,
    score: Score,
    sinks: Float[Array, "K G"] | None,
    interpret: Any,
) -> Float[Array, "R K G W"]:
    """One query a row; rows of length 0 give zeros."""
    num_rows, heads, groups, width = q_RKGW.shape
    padded = -(-groups // 8) * 8
    q_RKGW = jnp.pad(q_RKGW, ((0, 0), (0, 0), (0, padded - groups), (0, 0)))
    if sinks is None:
        sinks = jnp.full((heads, groups), LOWEST, jnp.float32)
    first_tops = jnp.pad(sinks, ((0, 0), (0, padded - groups)))[..., None]
    num_pages = pages_of_block(pages, tuned(TpuDecode).positions)
    held = arrays_of(pages)
    shape = (1, heads, padded, width)
    row_block = pl.BlockSpec(shape, lambda row, *_: (row, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, kind=kind_of(pages), score=score),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_rows,),
            in_specs=[
                row_block,
                pl.BlockSpec(first_tops.shape, lambda *_: (0, 0, 0)),
                (pl.BlockSpec(memory_space=pl.ANY),) * len(held),
            ],
            out_specs=row_block,
            scratch_shapes=[*scratch(pages, num_pages), pltpu.SMEM((1,), jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q_RKGW.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(pages, batch, num_rows, heads * groups),
        interpret=interpret,
        name="paged_attention_decode",
    )(layer, lens, batch.page_table, q_RKGW, first_tops, held)
    return out[:, :, :groups]


def _kernel(
    layer, lens, table, q_ref, top_ref, held, out_ref, buffers, semaphores, slot_ref,
    *, kind: str, score: Score,
) -> None:  # fmt: skip
    """One row. `slot_ref` holds the buffer that the next block to compute is in."""
    row, num_rows = pl.program_id(0), pl.num_programs(0)
    block = Block(held, table, layer[0], buffers, semaphores, kind)

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
        for head, (k_scales, v_scales) in enumerate(block.scales(slot)):
            k, v = block.keys_and_values(slot, head, width)
            s = scores(q_ref[0, head], k, visible, score, k_scales)
            top = jnp.maximum(m[head], jnp.max(s, axis=1, keepdims=True))
            p = jnp.where(visible, jnp.exp(s - top), 0.0)
            fade = jnp.exp(m[head] - top)
            summed = total[head] * fade + jnp.sum(p, axis=1, keepdims=True)
            parts.append((top, summed, acc[head] * fade + weighted(p, v, visible, v_scales)))
        tops, sums, accs = zip(*parts, strict=True)
        return jnp.stack(tops), jnp.stack(sums), jnp.stack(accs)

    top = top_ref[...]
    total = jnp.where(top > LOWEST, 1.0, 0.0)
    acc = jnp.zeros((heads, groups, width), jnp.float32)
    _, total, acc = lax.fori_loop(0, num_blocks, body, (top, total, acc))
    out_ref[0] = acc / jnp.where(total > 0, total, 1.0)
