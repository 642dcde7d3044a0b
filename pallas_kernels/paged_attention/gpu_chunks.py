"""Chunks on Hopper: rows of several queries, a tile of 2 × 64 tokens of one head at a time.

Grid (query head, tile), head fastest, so that the heads of one group find its pages in the L2
cache; the tiles of late positions, which see most, come first. A block of threads has one warpgroup
that copies pages into a ring and COMPUTERS that compute, each 64 tokens against every block:

    tokens   |a a a a a|b b b|...padding|        keys   --TMA--> | slot 0 | slot 1 |
    tiles    [0   ][1 ] [2 ]  [3        ]        values --TMA--> | slot 0 | slot 1 |

A whole tile leaves by one copy; of a row's last tile, whose end is another row's beginning, as few
tokens together as begin where TMA reads. Padding is one more row, that sees nothing: its result is
zero.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.paged_attention import gpu_block as block
from pallas_kernels.paged_attention import gpu_softmax as softmax
from pallas_kernels.paged_attention.score import Score
from pallas_kernels.paged_attention.tunables import GpuChunks
from pallas_kernels.quantized_pages import Pages, arrays_of, kind_of
from pallas_kernels.ragged import RaggedBatch
from pallas_kernels.tuning import tuned

COMPUTERS = 2
TILE = COMPUTERS * hopper.ROWS
#: Bytes of shared memory for the rings, the queries, the result and widened codes; the rest of the
#: 227 KiB is for barriers and weights.
BYTES = 224 * 1024


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


def tiles(batch: RaggedBatch, num_tokens: int, window: int | None, least: int) -> Tiles:
    """Tiles of all rows of at least so many queries, and of the padding behind them.

    Sums over comparisons, not the search and the running sum that they are: those are a dozen
    kernels, each of which takes as long as a tile.
    """
    num_rows = batch.context_lens.shape[0]
    padding = num_tokens - batch.query_starts[-1]
    lens = jnp.append(jnp.where(batch.query_lens >= least, batch.query_lens, 0), padding)
    counts = (lens + TILE - 1) // TILE
    most = num_tokens // TILE + min(num_rows, num_tokens // least) + 1
    tile = jnp.arange(most, dtype=jnp.int32)[::-1]  # the longest first
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    ends = jnp.sum(jnp.where(rows <= rows[:, None], counts[:-1], 0), axis=1)
    is_behind = ends <= tile[:, None]
    row = jnp.sum(is_behind, axis=1, dtype=jnp.int32)
    offset = (tile - jnp.sum(jnp.where(is_behind, counts[:-1], 0), axis=1)) * TILE
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
    least: int = 2,
) -> Float[Array, "T N H"]:
    """Of rows of at least `least` queries; zeros for padding, undefined for rows of fewer.

    Args:
        sinks: in log2.
    """
    num_tokens, num_heads, head_dim = q.shape
    kind, dtype, held = kind_of(pages), block.operand_dtype(pages), arrays_of(pages)
    chosen = tuned(GpuChunks)
    slots, span = _ring(chosen, head_dim, dtype, held[0].dtype, pages.shape[3])
    copies = block.copies(pages.shape[3], span, "")
    found = tiles(batch, num_tokens, score.window, least)
    per_head = num_heads // pages.shape[2]
    staged = (COMPUTERS, hopper.ROWS)
    return plgpu.kernel(
        functools.partial(
            _kernel,
            score=score,
            kind=kind,
            per_head=per_head,
            has_sinks=sinks is not None,
            chosen=chosen,
            is_interpreted=interpret is not None,
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            hopper.swizzled((*staged, head_dim), head_dim, dtype),
            [plgpu.SMEM((*staged, size), dtype) for size in _sizes(head_dim)],
            plgpu.Barrier(num_barriers=COMPUTERS),
            *[hopper.swizzled((slots, span, head_dim), head_dim, held[0].dtype)] * 2,
            plgpu.Barrier(num_arrivals=copies * (3 if kind else 1), num_barriers=slots),
            plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            *[plgpu.Barrier(num_arrivals=COMPUTERS, num_barriers=slots)] * 2,
            *softmax.scratch(kind, slots, span, head_dim, COMPUTERS, pages.shape[3]),
            *softmax.interpreted_scratch(interpret, span, head_dim, dtype, COMPUTERS),
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
        *held,
        *([] if sinks is None else [sinks]),
    )


def _sizes(head_dim: int) -> list[int]:
    """Columns of the results' parts, each number once: memory that several parts take in turn."""
    return sorted({size for _, size in block.columns(head_dim)})


def _ring(
    chosen: GpuChunks, head_dim: int, dtype: jnp.dtype, held: jnp.dtype, page_size: int
) -> tuple[int, int]:
    """Slots of the rings, and positions of a block: as many as there is room for.

    Args:
        dtype: of what is multiplied.
        held: of pages.
    """
    for slots, span in itertools.product(range(chosen.slots, 1, -1), (chosen.span, hopper.ROWS)):
        tokens = COMPUTERS * hopper.ROWS * (head_dim + sum(_sizes(head_dim))) * dtype.itemsize
        rings = 2 * slots * span * head_dim * held.itemsize
        wide = 2 * COMPUTERS * span * head_dim * dtype.itemsize
        scales = block.scales_scratch(slots, span, COMPUTERS, page_size)
        wide += sum(math.prod(x.shape) * x.dtype.itemsize for x in scales)
        if tokens + rings + (wide if held != dtype else 0) <= BYTES:
            return slots, span
    raise AssertionError(f"no room for heads of {head_dim}")


def _kernel(
    q, layer, table, tiles, pages, *refs,
    score: Score, kind: str, per_head: int, has_sinks: bool, chosen: GpuChunks,
    is_interpreted: bool,
) -> None:  # fmt: skip
    scales, refs = (refs[0], refs[1:]) if kind else (None, refs)
    sink_of: Any = refs[0] if has_sinks else None
    refs = refs[1:] if has_sinks else refs
    out, q_smem, staging, q_ready, *refs = refs
    key_tiles, value_tiles, keys_ready, values_ready, keys_free, values_free, *refs = refs
    widened, refs = (refs[:4], refs[4:]) if kind else ((None,) * 4, refs)
    head, tile = lax.axis_index("head"), lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    own = Tiles(*(tiles[tile, field] for field in range(len(Tiles._fields))))
    span, head_dim = key_tiles.shape[1:]
    parts = [
        (c, size, staging[_sizes(head_dim).index(size)]) for c, size in block.columns(head_dim)
    ]
    keys = softmax.Ring(key_tiles, keys_ready, keys_free, kind, widened[0], warpgroup)
    values = softmax.Ring(value_tiles, values_ready, values_free, kind, widened[1], warpgroup)
    scales_smem = block.Scales(widened[2], widened[3], warpgroup) if kind else None
    first = own.begin // span
    last = jnp.maximum(pl.cdiv(own.end, jnp.int32(span)), first) - 1
    count = last + 1 - first  # from the last block to the first

    @pl.when((warpgroup == COMPUTERS) & (own.size > 0))
    def _() -> None:
        plgpu.set_max_registers(chosen.copy_registers, action="decrease")
        source = block.Pages(pages, scales, table, layer[0], own.row, head // per_head, span)

        def copy_keys(position: Any, index: int, page: Any, slot: Any) -> None:
            place = position, index, page
            source.copy_half(*place, 0, key_tiles.at[slot], keys_ready.at[slot])
            for which in range(0 if scales_smem is None else 2):
                assert scales_smem is not None
                source.copy_scales(*place, which, scales_smem, slot, keys_ready.at[slot])

        def copy_values(position: Any, index: int, page: Any, slot: Any) -> None:
            target = value_tiles.at[slot]
            source.copy_half(position, index, page, 1, target, values_ready.at[slot])

        def load(i: Any, found: list[Any]) -> list[Any]:
            # The next block's pages are looked up while there is time.
            following = source.at(jnp.maximum(last - i - 1, 0) * span)
            for ring, copy in ((keys, copy_keys), (values, copy_values)):
                slot = hopper.await_free(ring.free, i, ring.tiles.shape[0])
                _each(functools.partial(copy, (last - i) * span, slot=slot), found, chosen.copiers)
            return following

        lax.fori_loop(0, count, load, source.at(jnp.maximum(last, 0) * span))
        for ring in (keys, values):
            hopper.drain(ring.free, count, ring.tiles.shape[0])

    # This warpgroup's tokens: the first, how many, and the positions that they see.
    token = own.token + warpgroup * hopper.ROWS
    live = jnp.clip(own.size - warpgroup * hopper.ROWS, 0, hopper.ROWS)
    position = own.position + warpgroup * hopper.ROWS
    end = jnp.minimum(own.end, position + live)

    def read_queries() -> None:
        for column, size, part in parts:
            source = q.at[pl.ds(token, hopper.ROWS), head, pl.ds(column, size)]
            plgpu.copy_gmem_to_smem(source, part.at[warpgroup], q_ready.at[warpgroup])
            plgpu.barrier_wait(q_ready.at[warpgroup])
            queries = plgpu.load(part.at[warpgroup], layout=plgpu.Layout.WGMMA)
            q_smem[warpgroup, :, pl.ds(column, size)] = queries
        plgpu.commit_smem()

    def leave(results: Sequence[Any]) -> None:
        """Writes the result's columns."""
        for (column, size, part), values in zip(parts, results, strict=True):
            plgpu.wait_smem_to_gmem(0)
            part[warpgroup] = values
            plgpu.commit_smem()

            def send(first: Any, rows: int, part: Any = part, where: Any = (column, size)) -> None:
                plgpu.copy_smem_to_gmem(
                    part.at[warpgroup, pl.ds(first, rows)],
                    out.at[pl.ds(token + first, rows), head, pl.ds(*where)],
                )

            _rows(live, _rows_of_a_copy(size * q_smem.dtype.itemsize), send)
        plgpu.wait_smem_to_gmem(0)

    def attend(*accumulators: Any) -> tuple[Any, ...]:
        weighted = softmax.Weighted(accumulators, refs[1].at[warpgroup] if is_interpreted else None)
        sink = None if sink_of is None else sink_of[head]
        work = softmax.Softmax(
            q_smem.at[warpgroup], keys, values, scales_smem, weighted, score, last
        )  # fmt: skip
        masks = softmax.Mask(position, end, own.begin, own.end, score.window)
        # Blocks that all see: behind every query, and in every query's window.
        start = jnp.where(live > 0, last - (end - 1) // span, count - 1)
        masked = jnp.clip(last + 1 - (position + 1) // span, start + 1, count)
        whole = count
        if score.window is not None:
            oldest = jnp.maximum(position + live - score.window, 0)
            whole = jnp.clip(last + 1 - pl.cdiv(oldest, jnp.int32(span)), masked, count)
        whole = jnp.where(live > 0, whole, count)
        masked = jnp.where(live > 0, masked, count)
        lax.fori_loop(0, start, work.skip, None)
        running = work.first(start, masks, sink)
        edge = functools.partial(work.step, mask=masks)
        running = lax.fori_loop(start + 1, masked, edge, running)
        running = lax.fori_loop(masked, whole, work.step, running)
        if score.window is not None:
            running = lax.fori_loop(whole, count, edge, running)
        total, parts = work.end(count - 1, running)
        total = jnp.where(total > 0, total, 1.0)
        return tuple(
            (part / lax.broadcast_in_dim(total, part.shape, [0])).astype(q_smem.dtype)
            for part in parts
        )

    @pl.when((warpgroup < COMPUTERS) & (own.size > 0))
    def _() -> None:
        plgpu.set_max_registers(chosen.compute_registers, action="increase")

        @pl.when(count > 0)
        def _() -> None:
            read_queries()
            leave(softmax.with_accumulators(attend, head_dim, is_interpreted, refs, warpgroup))

        @pl.when(count == 0)
        def _() -> None:
            leave([softmax.zeros(size).astype(out.dtype) for _, size in block.columns(head_dim)])


def _each(copy: Callable[..., None], found: list[Any], copiers: int) -> None:
    """Starts the copies of a block's pages, by so many warps of the copying warpgroup."""

    @plgpu.warp_map
    def _(warp: Any) -> None:
        for copier in range(copiers):

            @pl.when(warp == copier)
            def _(copier: int = copier) -> None:
                for index in range(copier, len(found), copiers):
                    copy(index, found[index])


def _rows_of_a_copy(row_bytes: int) -> int:
    """Rows whose copies begin where TMA reads: at a multiple of 128 bytes of shared memory."""
    return hopper.TMA_ALIGNMENT // math.gcd(hopper.TMA_ALIGNMENT, row_bytes)


def _rows(live: Any, together: int, send: Callable[[Any, int], None]) -> None:
    """Sends the first rows of a tile, all at once where all live, or `together` by `together`."""
    pl.when(live == hopper.ROWS)(lambda: send(0, hopper.ROWS))
    groups = jnp.where(live < hopper.ROWS, live // together, 0)
    lax.fori_loop(0, groups, lambda i, _: send(i * together, together), None)
    for rest in range(1, together):
        is_rest = (live < hopper.ROWS) & (lax.rem(live, jnp.int32(together)) == rest)
        pl.when(is_rest)(functools.partial(send, groups * together, rest))
