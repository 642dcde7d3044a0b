"""Chunks on Hopper: rows of several queries, a tile of 2 × 64 tokens of one head at a time.

Grid (query head, tile), head fastest, so that the heads of one group find its pages in the L2
cache; the tiles of late positions, which see most, come first. A block of threads has one warpgroup
that copies pages into a ring and COMPUTERS that compute, each 64 tokens against every block:

    tokens   |a a a a a|b b b|...padding|        pages --TMA--> | slot 0 | slot 1 |
    tiles    [0   ][1 ] [2 ]  [3        ]        warpgroup 0: tokens 0…63, 1: tokens 64…127

A whole tile leaves by one copy; of a row's last tile, whose end is another row's beginning, each
token by its own. Padding is one more row, that sees nothing: its result is zero.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.paged_attention import gpu_block as block
from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.quantized_pages import Pages, arrays_of, kind_of
from pallas_kernels.ragged import RaggedBatch

COMPUTERS = 2
TILE = COMPUTERS * hopper.ROWS
#: Bytes of one slot of the ring, at most, and how many there are.
SLOT_BYTES = 64 * 1024
SLOTS = 2


class Tiles(NamedTuple):
    """Which tokens each tile holds.

    Attributes:
        row: whose pages they see.
        token: the first.
        size: how many; 0 for a tile that is not used.
        position: of the first in its row.
        begin, end: positions that they see between them; end 0 for padding.
    """

    row: Int[Array, "I"]
    token: Int[Array, "I"]
    size: Int[Array, "I"]
    position: Int[Array, "I"]
    begin: Int[Array, "I"]
    end: Int[Array, "I"]


def tiles(batch: RaggedBatch, num_tokens: int, window: int | None) -> Tiles:
    """Tiles of all rows of several queries, and of the padding behind them."""
    num_rows = batch.context_lens.shape[0]
    padding = num_tokens - batch.query_starts[-1]
    lens = jnp.append(jnp.where(batch.query_lens > 1, batch.query_lens, 0), padding)
    counts = (lens + TILE - 1) // TILE
    ends = jnp.cumsum(counts)
    most = num_tokens // TILE + min(num_rows, num_tokens // 2) + 1
    tile = jnp.arange(most, dtype=jnp.int32)[::-1]  # the longest first
    row = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), num_rows).astype(jnp.int32)
    offset = (tile - (ends[row] - counts[row])) * TILE
    size = jnp.clip(lens[row] - offset, 0, TILE)
    contexts = jnp.append(batch.context_lens, 0)
    position = contexts[row] - lens[row] + offset
    is_padding = row == num_rows
    begin = jnp.zeros_like(tile) if window is None else jnp.maximum(position - window + 1, 0)
    return Tiles(
        row=jnp.minimum(row, num_rows - 1),
        token=batch.query_starts[row] + offset,
        size=size,
        position=jnp.where(is_padding, 0, position),
        begin=jnp.where(is_padding, 0, begin),
        end=jnp.where(is_padding, 0, position + size),
    )


def chunks(
    q: Float[Array, "T N H"],
    pages: Pages,
    layer: Int[Array, "1"],
    batch: RaggedBatch,
    score: Score,
    sinks: Float[Array, "N"] | None,
    cost: pl.CostEstimate,
    interpret: Any,
) -> Float[Array, "T N H"]:
    """Of rows of several queries; zeros for padding, undefined for rows of one.

    Args:
        sinks: in log2.
    """
    num_tokens, num_heads, head_dim = q.shape
    width = pages.shape[4]
    kind, dtype, held = kind_of(pages), block.operand_dtype(pages), arrays_of(pages)
    fits = SLOT_BYTES // (width * dtype.itemsize)
    span = max(hopper.ROWS, min(2 * hopper.ROWS, fits // hopper.ROWS * hopper.ROWS))
    copies = block.copies(pages.shape[3], span, kind)
    found = tiles(batch, num_tokens, score.window)
    weights = [hopper.swizzled((COMPUTERS, hopper.ROWS, span), span, dtype)]
    per_head = num_heads // pages.shape[2]
    return plgpu.kernel(
        functools.partial(
            _kernel,
            score=score,
            kind=kind,
            per_head=per_head,
            has_sinks=sinks is not None,
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            hopper.swizzled((COMPUTERS, hopper.ROWS, head_dim), head_dim, dtype),
            hopper.swizzled((SLOTS, span, width), head_dim, held[0].dtype),
            plgpu.SMEM((COMPUTERS, hopper.ROWS, block.columns(head_dim)[0][1]), dtype),
            plgpu.Barrier(num_barriers=COMPUTERS),
            plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=COMPUTERS, num_barriers=SLOTS),
            *block.code_scratch(kind, SLOTS, span, head_dim, COMPUTERS),
            *(weights if interpret is not None else ()),
        ),
        grid=(num_heads, found.row.shape[0]),
        grid_names=("head", "tile"),
        num_threads=COMPUTERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
        **hopper.estimated(cost),
    )(
        q,
        layer,
        batch.page_table,
        jnp.stack(found, axis=1),
        jnp.zeros((num_heads,), jnp.float32) if sinks is None else sinks,
        *held,
    )


def _kernel(
    q, layer, table, tiles, sinks, pages, *refs,
    score: Score, kind: str, per_head: int, has_sinks: bool,
) -> None:  # fmt: skip
    scales, refs = (refs[0], refs[1:]) if kind else (None, refs)
    out, q_smem, ring, staging, q_ready, ready, free, *refs = refs
    code_scratch, weights = (refs[:2], refs[2:]) if kind else ((), refs)
    head, tile = lax.axis_index("head"), lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    own = Tiles(*(tiles[tile, field] for field in range(len(Tiles._fields))))
    slots, span, head_dim = ring.shape[0], ring.shape[1], q_smem.shape[2]
    blocks = block.Ring(ring, warpgroup, kind, *code_scratch)
    first = own.begin // span
    count = jnp.maximum(pl.cdiv(own.end, jnp.int32(span)) - first, 0)

    @pl.when((warpgroup == COMPUTERS) & (own.size > 0))
    def _() -> None:
        plgpu.set_max_registers(hopper.COPY_REGISTERS, action="decrease")
        source = block.Pages(pages, scales, table, layer[0], own.row, head // per_head, span)

        def load(i: Any, slot: Any) -> None:
            source.copy((first + i) * span, blocks, slot, ready.at[slot])

        hopper.ahead(count, slots, free, load)

    operand = functools.partial(block.operand, *weights, place=warpgroup)

    # This warpgroup's tokens: the first, how many, and the positions that they see.
    token = own.token + warpgroup * hopper.ROWS
    live = jnp.clip(own.size - warpgroup * hopper.ROWS, 0, hopper.ROWS)
    position = own.position + warpgroup * hopper.ROWS
    end = jnp.minimum(own.end, position + live)

    def step(i: Any, running: block.Running, *, is_partial: bool) -> block.Running:
        slot = lax.rem(i, jnp.int32(slots))
        place = (first + i) * span
        block.await_pages(ready, slot)
        k, k_scales = blocks.half(slot, 0), blocks.scales_of(slot, 0)
        s = block.scores(q_smem.at[warpgroup], k, score, k_scales)
        v, v_scales = blocks.half(slot, 1), blocks.scales_of(slot, 1)
        if is_partial:
            query, key = position + block.iota(s.shape, 0), place + block.iota(s.shape, 1)
            visible = (key <= query) & (key < end)
            if score.window is not None:
                visible = visible & (key > query - score.window)
            s = jnp.where(visible, s, LOWEST)

            def inside(offset: Array) -> Array:
                return (place + offset >= own.begin) & (place + offset < own.end)

            if v_scales is not None:
                v_scales = jnp.where(inside(block.iota(s.shape, 1)), v_scales, 0.0)
            else:
                pl.when((place < own.begin) | (place + span > own.end))(
                    lambda: block.blank(v, head_dim, inside)
                )

        def values(column: int, size: int) -> Any:
            return v.at[:, pl.ds(column, size)]

        running = block.accumulate(running, s, values, operand, q_smem.dtype, v_scales)
        plgpu.barrier_arrive(free.at[slot])
        return running

    def skip(i: Any, _: None) -> None:
        """A block that only the other warpgroup's tokens see."""
        slot = lax.rem(i, jnp.int32(slots))
        block.await_pages(ready, slot)
        plgpu.barrier_arrive(free.at[slot])

    @pl.when((warpgroup < COMPUTERS) & (own.size > 0))
    def _() -> None:
        plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
        for column, size in block.columns(head_dim):
            whole_tile = staging.at[warpgroup, :, pl.ds(0, size)]
            source = q.at[pl.ds(token, hopper.ROWS), head, pl.ds(column, size)]
            plgpu.copy_gmem_to_smem(source, whole_tile, q_ready.at[warpgroup])
            plgpu.barrier_wait(q_ready.at[warpgroup])
            queries = plgpu.load(whole_tile, layout=plgpu.Layout.WGMMA)
            q_smem[warpgroup, :, pl.ds(column, size)] = queries
            plgpu.commit_smem()
        # Blocks that all see: behind every query, and in every query's window.
        seen = jnp.where(live > 0, jnp.clip(pl.cdiv(end, jnp.int32(span)) - first, 0, count), 0)
        whole = jnp.clip((position + 1) // span - first, 0, seen)
        partial = 0
        if score.window is not None:
            oldest = jnp.maximum(position + live - score.window, 0)
            partial = jnp.clip(pl.cdiv(oldest, jnp.int32(span)) - first, 0, whole)
        running = block.nothing(head_dim, sinks[head] if has_sinks else None)
        edge = functools.partial(step, is_partial=True)
        if score.window is not None:
            running = lax.fori_loop(0, partial, edge, running)
        inner = functools.partial(step, is_partial=False)
        running = lax.fori_loop(partial, whole, inner, running)
        running = lax.fori_loop(whole, seen, edge, running)
        lax.fori_loop(seen, count, skip, None)
        total = jnp.where(running.total > 0, running.total, 1.0)
        results = [
            (values / lax.broadcast_in_dim(total, values.shape, [0])).astype(q_smem.dtype)
            for values in running.parts
        ]
        for (column, size), values in zip(block.columns(head_dim), results, strict=True):
            plgpu.wait_smem_to_gmem(0)
            staging[warpgroup, :, pl.ds(0, size)] = values
            plgpu.commit_smem()

            @pl.when(live == hopper.ROWS)
            def _(column: int = column, size: int = size) -> None:
                plgpu.copy_smem_to_gmem(
                    staging.at[warpgroup, :, pl.ds(0, size)],
                    out.at[pl.ds(token, hopper.ROWS), head, pl.ds(column, size)],
                )

            def leave(i: Any, _: None, column: int = column, size: int = size) -> None:
                plgpu.copy_smem_to_gmem(
                    staging.at[warpgroup, pl.ds(i, 1), pl.ds(0, size)],
                    out.at[pl.ds(token + i, 1), head, pl.ds(column, size)],
                )

            lax.fori_loop(0, jnp.where(live < hopper.ROWS, live, 0), leave, None)
        plgpu.wait_smem_to_gmem(0)
