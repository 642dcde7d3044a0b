"""Decode on Hopper: rows of one query, their context split over blocks of threads.

Grid (split, KV head, row). A block of threads has one warpgroup that copies and two that compute,
each on every other block of positions, with a softmax of its own:

    pages --TMA--> | slot 0 | slot 1 | slot 2 | slot 3 |   a ring in shared memory
                      warpgroup 0 | 1 | 0 | 1
                                  └ its softmax goes to warpgroup 0, through shared memory

Where a context is one split, that is the result. Else each split writes a partial one: a maximum, a
sum and the weighted values, in float32; `merge` joins those.
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

COMPUTERS = 2
#: Positions that one warpgroup computes at once.
SPAN = 64
#: Bytes of the ring; the rest of the 227 KiB is for queries and results.
RING_BYTES = 128 * 1024
#: Rows of a shared-memory tile.
TILE = 8
#: Parts that are added up in one expression each, which XLA makes one kernel of.
UNROLLED_PARTS = 32


class Partial(NamedTuple):
    """What each split has seen.

    Attributes:
        values: weighted, not yet divided by the sums.
        tops, totals: maxima, in log2, and sums.
    """

    values: Float[Array, "S R X G H"]
    tops: Float[Array, "S R X G"]
    totals: Float[Array, "S R X G"]


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
    sinks: Float[Array, "X G"] | None,
    score: Score,
    cost: pl.CostEstimate,
    interpret: Any,
) -> Float[Array, "R X G H"]:
    """Attention of one query a row, in q's dtype; zeros where it sees nothing.

    Args:
        q_RXGH: X groups of G ≤ 64 query heads; X a multiple of K.
        begins, ends: positions that a row's query sees; nothing where they are equal.
        sinks: scores that count in the sum and have no value, in log2.
    """
    num_rows, groups, own, head_dim = q_RXGH.shape
    width, heads = pages.shape[4], pages.shape[2]
    kind, dtype = kind_of(pages), block.operand_dtype(pages)
    splits = num_splits(num_rows * groups, table.shape[1], pages.shape[3])
    is_whole = splits == 1 and sinks is None
    size = -(-own // TILE) * TILE
    q_RXGH = jnp.pad(q_RXGH, ((0, 0), (0, 0), (0, size - own), (0, 0)))
    # As many of codes as of their wide values, which take the rest of the room.
    slots = RING_BYTES // (SPAN * width * dtype.itemsize) // COMPUTERS * COMPUTERS
    weights = [hopper.swizzled((COMPUTERS, hopper.ROWS, SPAN), SPAN, dtype)]
    column = block.columns(head_dim)[0][1]
    copies = block.copies(pages.shape[3], SPAN, kind)
    held, parts = arrays_of(pages), (splits, num_rows, groups, size)
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
        ),
        out_type=(whole,) if is_whole else partial,
        scratch_types=(
            hopper.swizzled((hopper.ROWS, head_dim), head_dim, dtype),
            hopper.swizzled((slots, SPAN, width), head_dim, held[0].dtype),
            hopper.swizzled((hopper.ROWS, column), column, jnp.float32),
            plgpu.SMEM((2, hopper.ROWS), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=2),
            *([plgpu.SMEM((hopper.ROWS, head_dim), dtype)] if is_whole else []),
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
    if is_whole:
        return out[0]
    return merge(Partial(*(part[:, :, :, :own] for part in out)), sinks).astype(dtype)


def _kernel(
    q, layer, table, begins, ends, pages, *refs,
    score: Score, splits: int, kind: str, per_head: int, is_whole: bool,
) -> None:  # fmt: skip
    scales, refs = (refs[0], refs[1:]) if kind else (None, refs)
    outs, refs = (refs[:1], refs[1:]) if is_whole else (refs[:3], refs[3:])
    q_smem, ring, values_smem, stats_smem, q_ready, ready, free, handed, *refs = refs
    result_smem, refs = (refs[0], refs[1:]) if is_whole else (None, refs)
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
        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(q.at[row, group], q_smem.at[pl.ds(0, q.shape[2])], q_ready)

        plgpu.barrier_wait(q_ready)
        mine = jnp.maximum(count - warpgroup + COMPUTERS - 1, 0) // COMPUTERS
        running = lax.fori_loop(0, mine, step, block.nothing(head_dim))
        exchange = _Exchange(values_smem, stats_smem, *(handed.at[i] for i in range(2)))
        pl.when(warpgroup == 1)(lambda: exchange.give(running))

        @pl.when(warpgroup == 0)
        def _() -> None:
            if result_smem is not None:
                exchange.finish(running, result_smem, outs[0].at[row, group])
            else:
                exchange.write(running, *(out.at[split, row, group] for out in outs))


class _Exchange(NamedTuple):
    """Shared memory through which warpgroup 1's softmax goes to warpgroup 0, which joins it to its
    own and takes the result out.

    Attributes:
        values: [64, C], of one of `block.columns` after the other.
        stats: [2, 64].
        given, taken: barriers: something is there; room for the next.
    """

    values: Any
    stats: Any
    given: Any
    taken: Any

    def give(self, running: block.Running) -> None:
        """Warpgroup 1's part."""
        self.stats[0], self.stats[1] = running.top, running.total
        for index, part in enumerate(running.parts):
            if index:
                plgpu.barrier_wait(self.taken)
            self.values[:, pl.ds(0, part.shape[1])] = part
            plgpu.barrier_arrive(self.given)

    def finish(self, running: block.Running, result: Any, out: Any) -> None:
        """Warpgroup 0's, where there are no other splits.

        Args:
            result: shared memory [64, H], in rows.
            out: [G, H] in global memory.
        """
        plgpu.barrier_wait(self.given)
        _, total, fades = self._join(running)
        over = 1.0 / jnp.where(total > 0, total, 1.0)
        for index, (first, wide) in enumerate(block.columns_of(running)):
            values = self._values(running, index, fades)
            values = values * lax.broadcast_in_dim(over, values.shape, [0])
            result[:, pl.ds(first, wide)] = values.astype(result.dtype)
            if index + 1 < len(running.parts):
                plgpu.barrier_arrive(self.taken)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result.at[pl.ds(0, out.shape[0])], out)
        plgpu.wait_smem_to_gmem(0)

    def write(self, running: block.Running, out: Any, tops: Any, totals: Any) -> None:
        """Warpgroup 0's, where there are other splits.

        Args:
            out, tops, totals: [G, H] and [G] in global memory, G a multiple of TILE.
        """
        rows = pl.ds(0, out.shape[0])
        plgpu.barrier_wait(self.given)
        top, total, fades = self._join(running)
        self.stats[0], self.stats[1] = top, total
        plgpu.commit_smem()
        for index, target in enumerate((tops, totals)):
            plgpu.copy_smem_to_gmem(self.stats.at[index, rows], target)
        for index, (first, wide) in enumerate(block.columns_of(running)):
            values = self._values(running, index, fades)
            self.values[:, pl.ds(0, wide)] = values
            plgpu.commit_smem()
            source = self.values.at[rows, pl.ds(0, wide)]
            plgpu.copy_smem_to_gmem(source, out.at[:, pl.ds(first, wide)])
            plgpu.wait_smem_to_gmem(0)
            if index + 1 < len(running.parts):
                plgpu.barrier_arrive(self.taken)

    def _join(self, running: block.Running) -> tuple[Array, Array, tuple[Array, Array]]:
        """Maximum and sum of both, and what their values are to be multiplied by."""
        layout = plgpu.Layout.WGMMA.reduce(1)
        top, total = (plgpu.load(self.stats.at[i], layout=layout, optimized=False) for i in (0, 1))
        most = jnp.maximum(running.top, top)
        fades = jnp.exp2(running.top - most), jnp.exp2(top - most)
        return most, running.total * fades[0] + total * fades[1], fades

    def _values(
        self, running: block.Running, index: int, fades: tuple[Array, Array]
    ) -> Float[Array, "64 C"]:
        """One of `block.columns`, of both."""
        if index:
            plgpu.barrier_wait(self.given)
        own = running.parts[index]
        place = self.values.at[:, pl.ds(0, own.shape[1])]
        other = plgpu.load(place, layout=plgpu.Layout.WGMMA)
        mine, others = (lax.broadcast_in_dim(fade, own.shape, [0]) for fade in fades)
        return own * mine + other * others


def merge(partial: Partial, sinks: Float[Array, "X G"] | None) -> Float[Array, "R X G H"]:
    """The softmax over all parts; zeros where nothing was seen.

    Args:
        sinks: scores that count in the sum and have no value, in log2.
    """
    values, tops, totals = partial
    top = _over_parts(jnp.maximum, tops)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    weights = jnp.exp2(tops - top)
    total = _over_parts(jnp.add, totals * weights)
    if sinks is not None:
        total += jnp.exp2(sinks - top)
    values = _over_parts(jnp.add, values * weights[..., None])
    return values / jnp.where(total > 0, total, 1.0)[..., None]


def _over_parts(function: jnp.ufunc, parts: Float[Array, "S *B"]) -> Float[Array, "*B"]:
    """As a reduction, which XLA would make a kernel each of, or element by element."""
    if parts.shape[0] > UNROLLED_PARTS:
        return function.reduce(parts, axis=0)
    return functools.reduce(function, (parts[i] for i in range(parts.shape[0])))
