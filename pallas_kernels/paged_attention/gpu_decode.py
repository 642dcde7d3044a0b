"""Decode on Hopper: rows of one query, their context split over blocks of threads.

Grid (split, KV head, row). A block of threads has one warpgroup that copies and two that compute,
each on every other block of positions, with a softmax of its own:

    pages --TMA--> | slot 0 | slot 1 | slot 2 | slot 3 |   a ring in shared memory
                      warpgroup 0 | 1 | 0 | 1
                                  └ its softmax goes to warpgroup 0, through shared memory

Where a context is one split, that is the result. Else each split writes a partial one: a maximum, a
sum and the weighted values, in float32; `merge` joins those.

Given the rows' new keys and values, whichever block of threads reads a row's last position writes
them to the page, and puts them in their place in the ring, where the copy of the page may or may
not have brought them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.paged_attention import gpu_block as block
from pallas_kernels.paged_attention.gpu_merge import Exchange, Partial, merge
from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.paged_attention.tunables import GpuDecode
from pallas_kernels.quantized_pages import Pages, arrays_of, kind_of
from pallas_kernels.tuning import tuned

COMPUTERS = 2
#: Rows of a shared-memory tile.
TILE = 8
#: Blocks of threads that can draw the memory's whole bandwidth.
READERS = 32


def ring_shape(chosen: GpuDecode, width: int, itemsize: int, kind: str) -> tuple[int, int]:
    """Blocks of the ring, and positions of one: at least a block for each warpgroup.

    Args:
        width, itemsize: W, and bytes of an element of what is multiplied.
        kind: what codes are, whose wide values take the rest of the room; "" of numbers.
    """
    row_bytes = width * itemsize
    fits = COMPUTERS * chosen.span * row_bytes <= chosen.ring_bytes and not kind
    span = chosen.span if fits else hopper.ROWS
    slots = chosen.ring_bytes // (span * row_bytes) // COMPUTERS * COMPUTERS
    return max(slots, COMPUTERS), span


def num_splits(num_blocks: int, max_pages: int, page_size: int, span: int = hopper.ROWS) -> int:
    """The fewest splits of a context with which half of the rows draw the memory's bandwidth.

    Args:
        num_blocks: rows times KV heads.
        max_pages: of one row.
        span: positions that a warpgroup computes at once.
    """
    most = max(1, max_pages * page_size // (4 * COMPUTERS * span))
    return min(-(-2 * READERS // num_blocks), most)


def decode(
    q_RXGH: Float[Array, "R X G H"],
    pages: Pages,
    layer: Int[Array, "1"],
    table: Int[Array, "R M"],
    begins: Int[Array, "R"],
    ends: Int[Array, "R"],
    sinks: Float[Array, "X G"] | None,
    score: Score,
    cost: pl.CostEstimate,
    interpret: Any,
    new_RKIH: Float[Array, "R K 2 H"] | None = None,
) -> tuple[Float[Array, "R X G H"], Pages]:
    """Attention of one query a row, in q's dtype; zeros where it sees nothing.

    Args:
        q_RXGH: X groups of G ≤ 64 query heads; X a multiple of K.
        begins, ends: positions that a row's query sees; nothing where they are equal.
        sinks: scores that count in the sum and have no value, in log2.
        new_RKIH: key and value of each row's last position, which are to be written; X is K then,
            and the pages are no codes. None where all are in the pages.

    Returns:
        That, and the pages: the same buffer where the caller lets go of it.
    """
    num_rows, groups, own, head_dim = q_RXGH.shape
    width, heads = pages.shape[4], pages.shape[2]
    kind, dtype = kind_of(pages), block.operand_dtype(pages)
    # Of codes as many as of their wide values.
    slots, span = ring_shape(tuned(GpuDecode), width, dtype.itemsize, kind)
    splits = num_splits(num_rows * groups, table.shape[1], pages.shape[3], span)
    column = block.columns(head_dim)[0][1]
    # Results leave through rows of one column block, which is to be filled.
    is_whole = splits == 1 and sinks is None and head_dim % column == 0
    size = -(-own // TILE) * TILE
    queries = jnp.pad(q_RXGH, ((0, 0), (0, 0), (0, size - own), (0, 0)))
    held: list[Any] = list(arrays_of(pages))
    if new_RKIH is not None:
        # In one array with the queries, which XLA makes one kernel of; also in whole tiles.
        new = jnp.pad(new_RKIH, ((0, 0), (0, 0), (0, TILE - 2), (0, 0)))
        queries = jnp.concatenate([queries, new], axis=2)
        held = [jax.new_ref(array) for array in held]
    weights = [hopper.swizzled((COMPUTERS, hopper.ROWS, span), span, dtype)]
    copies = block.copies(pages.shape[3], span, kind)
    parts = splits, num_rows, groups, size
    whole = jax.ShapeDtypeStruct((num_rows, groups, own, head_dim), dtype)
    stats = jax.ShapeDtypeStruct(parts, jnp.float32)
    partial = jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32), stats, stats
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            score=score,
            splits=splits,
            kind=kind,
            per_head=groups // heads,
            is_whole=is_whole,
            size=size,
        ),
        out_type=(whole,) if is_whole else partial,
        scratch_types=(
            hopper.swizzled((hopper.ROWS, head_dim), head_dim, dtype),
            hopper.swizzled((slots, span, width), head_dim, held[0].dtype),
            hopper.swizzled((hopper.ROWS, column), column, jnp.float32),
            plgpu.SMEM((2, hopper.ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=1 if new_RKIH is None else 3),
            plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=2),
            *([plgpu.SMEM((hopper.ROWS, column), dtype)] if is_whole else []),
            *([plgpu.SMEM((2, _aligned(head_dim)), dtype)] if new_RKIH is not None else []),
            *block.code_scratch(kind, slots, span, head_dim, COMPUTERS, pages.shape[3]),
            *(weights if interpret is not None else ()),
        ),
        grid=(splits, groups, num_rows),
        grid_names=("split", "group", "row"),
        num_threads=COMPUTERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
        **hopper.estimated(cost),
    )(queries, layer, table, begins, ends, *held)
    if new_RKIH is not None:
        pages = jax.freeze(held[0])
    if is_whole:
        return out[0], pages
    return merge(Partial(*(part[:, :, :, :own] for part in out)), sinks).astype(dtype), pages


def _kernel(
    q, layer, table, begins, ends, pages, *refs,
    score: Score, splits: int, kind: str, per_head: int, is_whole: bool, size: int,
) -> None:  # fmt: skip
    scales, refs = (refs[0], refs[1:]) if kind else (None, refs)
    outs, refs = (refs[:1], refs[1:]) if is_whole else (refs[:3], refs[3:])
    q_smem, ring, values_smem, stats_smem, q_ready, ready, free, handed, *refs = refs
    result_smem, refs = (refs[0], refs[1:]) if is_whole else (None, refs)
    new_halves = []
    if q.shape[2] > size:
        new_smem, *refs = refs
        new_halves = [new_smem.at[i, pl.ds(0, q.shape[3])] for i in range(2)]
    code_scratch, weights = (refs[:3], refs[3:]) if kind else ((), refs)
    row, group, split = lax.axis_index("row"), lax.axis_index("group"), lax.axis_index("split")
    warpgroup = lax.axis_index("warpgroup")
    begin, end = begins[row], ends[row]
    (slots, span, _), head_dim, page_size = ring.shape, q_smem.shape[1], pages.shape[3]
    blocks = block.Ring(ring, warpgroup, kind, *code_scratch)
    first, last = begin // span, pl.cdiv(end, jnp.int32(span))
    share = pl.cdiv(last - first, jnp.int32(splits))
    first = first + split * share
    count = jnp.maximum(jnp.minimum(share, last - first), 0)

    @pl.when(warpgroup == COMPUTERS)
    def _() -> None:
        source = block.Pages(pages, scales, table, layer[0], row, group // per_head, span)

        def load(i: Any, slot: Any) -> None:
            source.copy((first + i) * span, blocks, slot, ready.at[slot])

        hopper.ahead(count, slots, free, load)

    operand = functools.partial(block.operand, *weights, place=warpgroup)

    def step(index: Any, running: block.Running) -> block.Running:
        i = index * COMPUTERS + warpgroup
        slot = lax.rem(i, jnp.int32(slots))
        position = (first + i) * span
        block.await_pages(ready, slot)

        def inside(offset: Array) -> Array:
            return (position + offset >= begin) & (position + offset < end)

        if new_halves:
            pl.when(position + span >= end)(
                lambda: _put(ring.at[slot], new_halves, end - 1 - position)
            )
        s = block.scores(q_smem, blocks.half(slot, 0), score, blocks.scales_of(slot, 0))
        is_inside = inside(block.iota(s.shape, 1))
        s = jnp.where(is_inside, s, LOWEST)
        v, v_scales = blocks.half(slot, 1), blocks.scales_of(slot, 1)
        if v_scales is not None:
            v_scales = jnp.where(is_inside, v_scales, 0.0)
        else:
            pl.when((position < begin) | (position + span > end))(
                lambda: block.blank(v, head_dim, inside)
            )

        def values(column: int, size: int) -> Any:
            return v.at[:, pl.ds(column, size)]

        running = block.accumulate(running, s, values, operand, q_smem.dtype, v_scales)
        plgpu.barrier_arrive(free.at[slot])
        return running

    @pl.when(warpgroup < COMPUTERS)
    def _() -> None:
        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(
                q.at[row, group, pl.ds(0, size)], q_smem.at[pl.ds(0, size)], q_ready
            )
            for index, half in enumerate(new_halves):
                plgpu.copy_gmem_to_smem(q.at[row, group, size + index], half, q_ready)

        plgpu.barrier_wait(q_ready)

        @pl.when((warpgroup == 0) & (count > 0) & (first + count == last))
        def _() -> None:
            place = end - 1
            page, offset = table[row, place // page_size], lax.rem(place, jnp.int32(page_size))
            for index, half in enumerate(new_halves):
                lanes = pl.ds(index * head_dim, head_dim)
                target = pages.at[layer[0], page, group, offset, lanes]
                plgpu.copy_smem_to_gmem(half, target)

        mine = jnp.maximum(count - warpgroup + COMPUTERS - 1, 0) // COMPUTERS
        running = lax.fori_loop(0, mine, step, block.nothing(head_dim))
        exchange = Exchange(values_smem, stats_smem, *(handed.at[i] for i in range(2)))
        pl.when(warpgroup == 1)(lambda: exchange.give(running))

        @pl.when(warpgroup == 0)
        def _() -> None:
            if result_smem is not None:
                exchange.finish(running, result_smem, outs[0].at[row, group])
            else:
                exchange.write(running, *(out.at[split, row, group] for out in outs))


def _put(tile: Any, new_halves: list[Any], offset: Any) -> None:
    """A new key and value in their place in a block of the ring.

    Args:
        tile: [block, 2H].
        new_halves: [H] each.
    """
    head_dim, layout = tile.shape[1] // 2, plgpu.Layout.WGMMA.reduce(0)
    for index, half in enumerate(new_halves):
        for column, size in block.columns(head_dim):
            part = tile.at[:, pl.ds(index * head_dim + column, size)]
            old = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            row = plgpu.load(half.at[pl.ds(column, size)], layout=layout, optimized=False)
            is_new = block.iota(old.shape, 0) == offset
            part[...] = jnp.where(is_new, lax.broadcast_in_dim(row, old.shape, [1]), old)
    plgpu.commit_smem()


def _aligned(head_dim: int) -> int:
    """Elements of 16 bits behind which the next row begins where TMA can read and write."""
    return -(-head_dim // 64) * 64
