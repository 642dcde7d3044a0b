"""Decode on Hopper: rows of one query, their context split over blocks of threads.

Grid (split, KV head, row). A block of threads has one warpgroup that copies and COMPUTERS that
compute, each on every COMPUTERS-th block of positions, with a softmax of its own:

    pages --TMA--> | slot 0 | slot 1 | slot 2 | slot 3 |   a ring in shared memory
                      warpgroup 0 | 1 | 0 | 1               each writes its partial result

A partial result is a maximum, a sum and the weighted values, in float32; `merge` joins those of all
splits and warpgroups.
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
from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.quantized_pages import Pages, arrays_of, kind_of

COMPUTERS = 2
#: Positions that one warpgroup computes at once.
SPAN = 64
#: Bytes of the ring; the rest of the 227 KiB is for queries and results.
RING_BYTES = 128 * 1024

Partial = tuple[Float[Array, "S R X G H"], Float[Array, "S R X G"], Float[Array, "S R X G"]]


def num_splits(num_blocks: int, max_pages: int, page_size: int) -> int:
    """Splits of a context that leave the processors the least idle time.

    Args:
        num_blocks: rows times KV heads.
        max_pages: of one row.
    """
    most = max(1, max_pages * page_size // (4 * COMPUTERS * SPAN))

    def rounds(splits: int) -> float:
        # Each block of threads starts and ends once, which costs about as much as a sixteenth of
        # a longest context.
        return -(-num_blocks * splits // hopper.PROCESSORS) * (1 / splits + 1 / 16 / most)

    return min(range(1, min(most, hopper.PROCESSORS) + 1), key=rounds)


def decode(
    q_RXGH: Float[Array, "R X G H"],
    pages: Pages,
    layer: Int[Array, "1"],
    table: Int[Array, "R M"],
    begins: Int[Array, "R"],
    ends: Int[Array, "R"],
    score: Score,
    splits: int,
    cost: pl.CostEstimate,
    interpret: Any,
) -> Partial:
    """Weighted values, maxima (in log2) and sums, of each split and warpgroup.

    Args:
        q_RXGH: X groups of G ≤ 64 query heads, G a multiple of 8; X a multiple of K.
        begins, ends: positions that a row's query sees; nothing where they are equal.
    """
    num_rows, groups, size, head_dim = q_RXGH.shape
    width, heads = pages.shape[4], pages.shape[2]
    kind, dtype = kind_of(pages), block.operand_dtype(pages)
    # As many of codes as of their wide values, which take the rest of the room.
    slots = RING_BYTES // (SPAN * width * dtype.itemsize) // COMPUTERS * COMPUTERS
    parts = splits * COMPUTERS
    kernel = functools.partial(_kernel, score=score, splits=splits)
    weights = [hopper.swizzled((COMPUTERS, hopper.ROWS, SPAN), SPAN, dtype)]
    column = block.columns(head_dim)[0][1]
    copies = block.copies(pages.shape[3], SPAN, kind)
    held = arrays_of(pages)
    return plgpu.kernel(
        functools.partial(kernel, kind=kind, per_head=groups // heads),
        out_type=(
            jax.ShapeDtypeStruct((parts, num_rows, groups, size, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((parts, num_rows, groups, size), jnp.float32),
            jax.ShapeDtypeStruct((parts, num_rows, groups, size), jnp.float32),
        ),
        scratch_types=(
            hopper.swizzled((hopper.ROWS, head_dim), head_dim, dtype),
            hopper.swizzled((slots, SPAN, width), head_dim, held[0].dtype),
            hopper.swizzled((COMPUTERS, hopper.ROWS, column), column, jnp.float32),
            plgpu.SMEM((COMPUTERS, 2, hopper.ROWS), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            *block.code_scratch(kind, slots, SPAN, head_dim, COMPUTERS, pages.shape[3]),
            *(weights if interpret is not None else ()),
        ),
        grid=(splits, groups, num_rows),
        grid_names=("split", "group", "row"),
        num_threads=COMPUTERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
        **hopper.estimated(cost),
    )(q_RXGH, layer, table, begins, ends, *held)


def _kernel(
    q, layer, table, begins, ends, pages, *refs,
    score: Score, splits: int, kind: str, per_head: int,
) -> None:  # fmt: skip
    scales, refs = (refs[0], refs[1:]) if kind else (None, refs)
    out, tops, totals, q_smem, ring, out_smem, stats_smem, q_ready, ready, free, *refs = refs
    code_scratch, weights = (refs[:3], refs[3:]) if kind else ((), refs)
    row, group, split = lax.axis_index("row"), lax.axis_index("group"), lax.axis_index("split")
    warpgroup = lax.axis_index("warpgroup")
    begin, end = begins[row], ends[row]
    slots, head_dim = ring.shape[0], q_smem.shape[1]
    blocks = block.Ring(ring, warpgroup, kind, *code_scratch)
    first, last = begin // SPAN, pl.cdiv(end, jnp.int32(SPAN))
    share = pl.cdiv(last - first, jnp.int32(splits))
    first = first + split * share
    count = jnp.maximum(jnp.minimum(share, last - first), 0)

    @pl.when(warpgroup == COMPUTERS)
    def _() -> None:
        source = block.Pages(pages, scales, table, layer[0], row, group // per_head, SPAN)

        def load(i: Any, slot: Any) -> None:
            source.copy((first + i) * SPAN, blocks, slot, ready.at[slot])

        hopper.ahead(count, slots, free, load)

    operand = functools.partial(block.operand, *weights, place=warpgroup)

    def step(index: Any, running: block.Running) -> block.Running:
        i = index * COMPUTERS + warpgroup
        slot = lax.rem(i, jnp.int32(slots))
        position = (first + i) * SPAN
        block.await_pages(ready, slot)

        def inside(offset: Array) -> Array:
            return (position + offset >= begin) & (position + offset < end)

        s = block.scores(q_smem, blocks.half(slot, 0), score, blocks.scales_of(slot, 0))
        is_inside = inside(block.iota(s.shape, 1))
        s = jnp.where(is_inside, s, LOWEST)
        v, v_scales = blocks.half(slot, 1), blocks.scales_of(slot, 1)
        if v_scales is not None:
            v_scales = jnp.where(is_inside, v_scales, 0.0)
        else:
            pl.when((position < begin) | (position + SPAN > end))(
                lambda: block.blank(v, head_dim, inside)
            )

        def values(column: int, size: int) -> Any:
            return v.at[:, pl.ds(column, size)]

        running = block.accumulate(running, s, values, operand, q_smem.dtype, v_scales)
        plgpu.barrier_arrive(free.at[slot])
        return running

    @pl.when(warpgroup < COMPUTERS)
    def _() -> None:
        size = q.shape[2]

        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(q.at[row, group], q_smem.at[pl.ds(0, size)], q_ready)

        plgpu.barrier_wait(q_ready)
        mine = jnp.maximum(count - warpgroup + COMPUTERS - 1, 0) // COMPUTERS
        running = lax.fori_loop(0, mine, step, block.nothing(head_dim))
        part = split * COMPUTERS + warpgroup
        stats_smem[warpgroup, 0] = running.top
        stats_smem[warpgroup, 1] = running.total
        plgpu.commit_smem()
        for index, target in enumerate((tops, totals)):
            stat = stats_smem.at[warpgroup, index, pl.ds(0, size)]
            plgpu.copy_smem_to_gmem(stat, target.at[part, row, group])
        for (column, wide), values in zip(block.columns(head_dim), running.parts, strict=True):
            plgpu.wait_smem_to_gmem(0)
            out_smem[warpgroup, :, pl.ds(0, wide)] = values
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup, pl.ds(0, size), pl.ds(0, wide)],
                out.at[part, row, group, :, pl.ds(column, wide)],
            )
        plgpu.wait_smem_to_gmem(0)


def merge(partial: Partial, sinks: Float[Array, "X G"] | None) -> Float[Array, "R X G H"]:
    """The softmax over all parts; zeros where nothing was seen.

    Args:
        sinks: scores that count in the sum and have no value, in log2.
    """
    values, tops, totals = partial
    top = jnp.max(tops, axis=0)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    weights = jnp.exp2(tops - top)
    total = jnp.sum(totals * weights, axis=0)
    if sinks is not None:
        total += jnp.exp2(sinks - top)
    return (
        jnp.sum(values * weights[..., None], axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
    )
