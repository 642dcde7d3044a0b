"""One block of keys and values against 64 rows of queries, on one Hopper warpgroup.

Shared by the decode and the chunk kernel: the shared-memory layout of pages, the running softmax in
registers, and the two matrix products (wgmma) of a block. Scores are kept in units of log2, so that
the exponentials are the hardware's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import quantized_pages
from pallas_kernels.hopper import ROWS, SWIZZLES, TMA_ALIGNMENT, accumulator, swizzled
from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.quantized_pages import kind_of, widened

#: Columns of an output accumulator; wider heads have several.
COLUMNS = 128
LOG2_E = math.log2(math.e)


def columns(head_dim: int) -> list[tuple[int, int]]:
    """(first, number) of the output columns that are accumulated together."""
    return [(c, min(COLUMNS, head_dim - c)) for c in range(0, head_dim, COLUMNS)]


def iota(shape: tuple[int, ...], dimension: int) -> Int[Array, "X Y"]:
    """In a wgmma's register layout."""
    rows, width = shape
    return plgpu.broadcasted_iota(jnp.int32, (rows, width), dimension, layout=plgpu.Layout.WGMMA)


class Running(NamedTuple):
    """The softmax so far, of ROWS queries.

    Attributes:
        top, total: running maximum, in log2, and sum.
        parts: weighted values, `columns` of them each.
    """

    top: Float[Array, "64"]
    total: Float[Array, "64"]
    parts: tuple[Float[Array, "64 C"], ...]


def nothing(head_dim: int, sink: Any = None) -> Running:
    """Before the first block.

    Args:
        sink: a score, in log2, that counts in the sum and has no value; None for none.
    """

    def row(value: Any) -> Array:
        full = jnp.full((ROWS,), value, jnp.float32)
        return plgpu.layout_cast(full, plgpu.Layout.WGMMA.reduce(1))

    parts = tuple(
        plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA)
        for _, size in columns(head_dim)
    )
    if sink is None:
        return Running(row(LOWEST), row(0.0), parts)
    return Running(row(sink), row(1.0), parts)


def scores(
    q_smem: Any, k_smem: Any, score: Score, k_scales: Float[Array, "64 B"] | None
) -> Float[Array, "64 B"]:
    """Of ROWS queries and a block's keys, in log2.

    Args:
        k_scales: of keys that are codes.
    """

    def multiply(out: Any) -> Array:
        plgpu.wgmma(out, q_smem, k_smem.transpose((1, 0)))
        return out[...]

    s = pl.run_scoped(multiply, accumulator(ROWS, k_smem.shape[0]))
    if k_scales is not None:
        s = s * k_scales
    if score.soft_cap is None:
        return s * (score.scale * LOG2_E)
    return jnp.tanh(s * (score.scale / score.soft_cap)) * (score.soft_cap * LOG2_E)


def operand(*weights: Any, place: Any) -> Any:
    """The weights as wgmma takes them: in registers, or in shared memory if interpreted.

    Args:
        weights: shared memory [computers, 64, B] where interpreted, then the weights themselves.
        place: of the warpgroup in that memory.
    """
    *scratch, p = weights
    if not scratch:
        return p
    scratch[0][place] = p
    plgpu.commit_smem()
    return scratch[0].at[place]


def accumulate(
    running: Running,
    s: Float[Array, "64 B"],
    values: Callable[[int, int], Any],
    operand: Callable[[Array], Any],
    dtype: DTypeLike,
    v_scales: Float[Array, "64 B"] | None,
) -> Running:
    """One block more.

    Args:
        s: scores, LOWEST where a query does not look. A query that has seen nothing yet counts
            such a block as if it saw all of it, until the first score that it sees wipes that out.
        values: the block's values, so many columns from a first one on.
        operand: puts the weights where wgmma takes them from.
        v_scales: of values that are codes; 0 where they may not be numbers.
    """
    top = jnp.maximum(running.top, s.max(axis=1))
    fade = jnp.exp2(running.top - top)
    p = jnp.exp2(s - lax.broadcast_in_dim(top, s.shape, [0]))
    total = running.total * fade + p.sum(axis=1)
    if v_scales is not None:
        p = p * v_scales
    weights = operand(p.astype(dtype))
    parts = []
    for part, (first, size) in zip(running.parts, columns_of(running), strict=True):

        def multiply(out: Any, first: int = first, size: int = size) -> Array:
            plgpu.wgmma(out, weights, values(first, size))
            return out[...]

        product = pl.run_scoped(multiply, accumulator(*part.shape))
        parts.append(part * lax.broadcast_in_dim(fade, part.shape, [0]) + product)
    return Running(top, total, tuple(parts))


def columns_of(running: Running) -> list[tuple[int, int]]:
    """`columns` of its head."""
    return columns(sum(part.shape[1] for part in running.parts))


def blank(v_smem: Any, head_dim: int, inside: Callable[[Array], Bool[Array, "X Y"]]) -> None:
    """Zeros in the values of positions that are not `inside`: they may be NaN there.

    Args:
        inside: of the positions' offsets in the block.
    """
    for first in range(0, v_smem.shape[0], ROWS):
        for column, size in columns(head_dim):
            tile = v_smem.at[pl.ds(first, ROWS), pl.ds(column, size)]
            values = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
            is_inside = inside(first + iota((ROWS, size), 0))
            tile[...] = jnp.where(is_inside, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def widen(tile: Any, staging: Any, kind: str) -> Any:
    """A block's codes as wgmma takes them, in shared memory that no wgmma reads any more.

    Args:
        tile, staging: [B, H].
    """
    head_dim = tile.shape[1]
    is_swizzled = head_dim % min(SWIZZLES) == 0
    plgpu.commit_smem()
    for first in range(0, tile.shape[0], ROWS):
        for column, size in columns(head_dim):
            part = pl.ds(first, ROWS), pl.ds(column, size)
            layout = plgpu.Layout.WGMMA_UPCAST_2X
            codes = plgpu.load(tile.at[part], layout=layout, optimized=is_swizzled)
            staging[part] = plgpu.layout_cast(widened(codes, kind), plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    return staging


class Scales(NamedTuple):
    """Scales of blocks of codes in shared memory.

    Each copy's lie on their own where they are too few for the next copy to begin where TMA writes.

    Attributes:
        memory: [slots, 2, 1, block], of keys and of values, or [slots, 2, copies, scales and more].
        packed: [warpgroups, 2, block], where each puts those of one block side by side.
        warpgroup: which one.
    """

    memory: Any
    packed: Any
    warpgroup: Any

    @property
    def _each(self) -> int:
        """Scales of one of several copies."""
        return self.packed.shape[2] // self.memory.shape[2]

    def target(self, slot: Any, which: int, index: int, size: int) -> Any:
        """Where a block's copy of some scales goes, of keys (0) or of values (1)."""
        if self.memory.shape[2] == 1:
            return self.memory.at[slot, which, 0, pl.ds(index * size, size)]
        return self.memory.at[slot, which, index, pl.ds(0, size)]

    def row(self, slot: Any, which: int) -> Float[Array, "64 B"]:
        """Of keys (0) or of values (1), for each of ROWS queries."""
        layout = plgpu.Layout.WGMMA.reduce(0)
        source, pieces = self.memory.at[slot, which, 0], self.memory.shape[2]
        if pieces > 1:
            source = self.packed.at[self.warpgroup, which]
            for index in range(pieces):
                piece = self.target(slot, which, index, self._each)
                values = plgpu.load(piece, layout=layout, optimized=False)
                source[pl.ds(index * self._each, self._each)] = values
        row = plgpu.load(source, layout=layout, optimized=False)
        return lax.broadcast_in_dim(row, (ROWS, row.shape[0]), [1])


class Ring(NamedTuple):
    """Blocks of pages in shared memory, as one warpgroup computes them.

    Attributes:
        pages: [slots, block, W].
        warpgroup: which one.
        kind: what codes are; "" of pages that are numbers, which have no more than this.
        staging: [warpgroups, block, H], where each widens the keys, or the values, of one block.
        memory, packed: of `Scales`.
    """

    pages: Any
    warpgroup: Any
    kind: str
    staging: Any = None
    memory: Any = None
    packed: Any = None

    @property
    def scales(self) -> Scales:
        """Of codes."""
        return Scales(self.memory, self.packed, self.warpgroup)

    def half(self, slot: Any, which: int) -> Any:
        """Keys (0) or values (1), as wgmma takes them: until the other half is asked for."""
        head_dim = self.pages.shape[2] // 2
        tile = self.pages.at[slot, :, pl.ds(which * head_dim, head_dim)]
        if not self.kind:
            return tile
        return widen(tile, self.staging.at[self.warpgroup], self.kind)

    def scales_of(self, slot: Any, which: int) -> Float[Array, "64 B"] | None:
        """Of keys (0) or values (1), for each of ROWS queries; None of pages of numbers."""
        return self.scales.row(slot, which) if self.kind else None


class Pages(NamedTuple):
    """The pages of one KV head of one row, moved block by block.

    Attributes:
        pages, scales, table: in global memory; scales None of pages that are numbers.
        layer, row, head: whose pages.
        block: positions of a block, a multiple of the page size or a divisor of it.
    """

    pages: Any
    scales: Any
    table: Any
    layer: Any
    row: Any
    head: Any
    block: int

    @property
    def span(self) -> int:
        """Positions that one copy moves."""
        return copied(self.pages.shape[3], self.block)

    def at(self, position: Any) -> list[Any]:
        """The pages that hold the block at a position, one a copy; the table's end repeats."""
        page_size, last = self.pages.shape[3], self.table.shape[1] - 1
        return [
            self.table[self.row, jnp.minimum((position + offset) // page_size, last)]
            for offset in range(0, self.block, self.span)
        ]

    def copy(self, position: Any, ring: Ring, slot: Any, barrier: Any) -> None:
        """Starts copying the block at a position, keys and values.

        Args:
            barrier: arrived at once a copy, `copies` times.
        """
        for index, page in enumerate(self.at(position)):
            rows = self._rows(position, index)
            plgpu.copy_gmem_to_smem(
                self.pages.at[self.layer, page, self.head, rows],
                ring.pages.at[slot, pl.ds(index * self.span, self.span)],
                barrier,
            )
            for which in range(2 if self.scales is not None else 0):
                self.copy_scales(position, index, page, which, ring.scales, slot, barrier)

    def copy_half(
        self, position: Any, index: int, page: Any, which: int, target: Any, barrier: Any
    ) -> None:
        """Starts one copy of a block at a position: its keys (0) or its values (1).

        Args:
            index: which copy.
            page: of it, from `at`.
            target: shared memory of the block.
            barrier: arrived at once.
        """
        head_dim = self.pages.shape[4] // 2
        half = pl.ds(which * head_dim, head_dim)
        plgpu.copy_gmem_to_smem(
            self.pages.at[self.layer, page, self.head, self._rows(position, index), half],
            target.at[pl.ds(index * self.span, self.span)],
            barrier,
        )

    def copy_scales(
        self, position: Any, index: int, page: Any, which: int, scales: Scales, slot: Any,
        barrier: Any,
    ) -> None:  # fmt: skip
        """As `copy_half`, of the scales of codes."""
        lanes = self._rows(position, index).start + which * (self.scales.shape[3] // 2)
        plgpu.copy_gmem_to_smem(
            self.scales.at[self.layer, page, self.head, pl.ds(lanes, self.span)],
            scales.target(slot, which, index, self.span),
            barrier,
        )

    def _rows(self, position: Any, index: int) -> Any:
        """Of a page, that a copy moves."""
        page_size = self.pages.shape[3]
        if self.span == page_size:
            return pl.ds(0, page_size)
        place = position + index * self.span
        return pl.ds(lax.rem(place, jnp.int32(page_size)), self.span)


def await_pages(ready: Any, slot: Any) -> None:
    """Waits until a slot of the ring is filled.

    Args:
        ready: barriers, a slot each, arrived at by the copies.
    """
    plgpu.barrier_wait(ready.at[slot])


def copied(page_size: int, block: int) -> int:
    """Positions that one copy moves."""
    return min(page_size, block)


def copies(page_size: int, block: int, kind: str) -> int:
    """Copies that bring a block: of keys and values together, and of both's scales."""
    return block // copied(page_size, block) * (3 if kind else 1)


def operand_dtype(pages: quantized_pages.Pages) -> jnp.dtype:
    """What is multiplied."""
    return jnp.dtype(jnp.bfloat16) if kind_of(pages) else pages.dtype


def code_scratch(
    kind: str, slots: int, span: int, head_dim: int, computers: int, page_size: int
) -> list[Any]:
    """Shared memory for widened codes and for their scales; nothing for pages of numbers."""
    if not kind:
        return []
    wide = swizzled((computers, span, head_dim), head_dim, jnp.bfloat16)
    return [wide, *scales_scratch(slots, span, computers, page_size)]


def scales_scratch(slots: int, span: int, computers: int, page_size: int) -> list[Any]:
    """Shared memory of `Scales`."""
    size, aligned = copied(page_size, span), TMA_ALIGNMENT // jnp.dtype(jnp.float32).itemsize
    shape = (1, span) if size % aligned == 0 else (span // size, -(-size // aligned) * aligned)
    return [
        plgpu.SMEM((slots, 2, *shape), jnp.float32),
        plgpu.SMEM((computers, 2, span), jnp.float32),
    ]
