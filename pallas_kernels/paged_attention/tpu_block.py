"""Blocks of pages on a TPU: how they are moved to VMEM, and the products of one of them.

Shared by the decode and the chunk kernel. Pages of codes bring a tile of scales each; codes are
widened in VMEM, scores multiplied by their keys' scales, and weights by their values'.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.quantized_pages import Pages, arrays_of, halves, widened
from pallas_kernels.ragged import RaggedBatch


class Block(NamedTuple):
    """Pages that are moved and computed together.

    Attributes:
        held, table: what pages are made of, in HBM, and the page tables of all rows in SMEM.
        buffers, semaphores: two for each of `held`.
        kind: what codes are; "" of pages that are numbers.
    """

    held: tuple[Any, ...]
    table: Any
    layer: Any
    buffers: tuple[Any, ...]
    semaphores: Any
    kind: str

    @property
    def num_pages(self) -> int:
        """Of a block."""
        return self.buffers[0].shape[1]

    @property
    def page_size(self) -> int:
        return self.buffers[0].shape[3]

    @property
    def span(self) -> int:
        """Positions of a block."""
        return self.num_pages * self.page_size

    def copies(self, row: Any, first_page: Any, slot: Any) -> list[Any]:
        """The copies of one block, to be started or waited for; the table's end repeats."""
        last = self.table.shape[1] - 1
        return [
            pltpu.make_async_copy(
                held.at[self.layer, self.table[row, jnp.minimum(first_page + i, last)]],
                buffer.at[slot, i],
                self.semaphores.at[slot, which],
            )
            for i in range(self.num_pages)
            for which, (held, buffer) in enumerate(zip(self.held, self.buffers, strict=True))
        ]

    def blank(self, slot: Any, position: Any, begin: Any, end: Any) -> None:
        """Zeros wherever a block from `position` on is outside begin … end - 1.

        Weights there are 0 already, but what lies there may be NaN. Codes are not, as `widened`
        takes them, and weights that were multiplied by a scale are masked again.
        """
        if self.kind:
            return
        buffer = self.buffers[0]

        @pl.when((position < begin) | (position + self.span > end))
        def _() -> None:
            block = buffer[slot]
            shape = (self.num_pages, 1, self.page_size, 1)
            place = position + lax.broadcasted_iota(jnp.int32, shape, 0) * self.page_size
            place = place + lax.broadcasted_iota(jnp.int32, shape, 2)
            inside = jnp.broadcast_to((place >= begin) & (place < end), block.shape)
            buffer[slot] = jnp.where(inside, block, jnp.zeros_like(block))

    def keys_and_values(self, slot: Any, head: int, width: int) -> tuple[Array, Array]:
        """Of one KV head, [span, width] each; the same array where they are not taken apart."""
        kv = self.buffers[0][slot, :, head].reshape(self.span, -1)
        if self.kind:
            kv = widened(kv, self.kind)
        if kv.shape[-1] == width:
            return kv, kv
        return kv[:, :width], kv[:, width:]

    def scales(self, slot: Any) -> list[tuple[Array | None, Array | None]]:
        """Of the keys and the values of each KV head, [1, span]; None of pages of numbers."""
        num_heads = self.buffers[0].shape[2]
        if not self.kind:
            return [(None, None)] * num_heads
        pages = [halves(self.buffers[1][slot, i], self.page_size) for i in range(self.num_pages)]
        k, v = (jnp.concatenate(tiles, axis=-1) for tiles in zip(*pages, strict=True))
        return [(k[head : head + 1], v[head : head + 1]) for head in range(num_heads)]


def scores(
    q_XW: Array, k_SW: Array, visible: Array, score: Score, k_scales: Float[Array, "1 S"] | None
) -> Array:
    s = lax.dot_general(
        q_XW,
        k_SW,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=_exact(q_XW),
    )
    s = s * score.scale
    if k_scales is not None:
        s = s * k_scales
    if score.soft_cap is not None:
        s = score.soft_cap * jnp.tanh(s / score.soft_cap)
    return jnp.where(visible, s, LOWEST)


def _exact(x: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def weighted(p: Array, v_SW: Array, visible: Array, v_scales: Float[Array, "1 S"] | None) -> Array:
    if v_scales is not None:
        p = jnp.where(visible, p * v_scales, 0.0)
    p = p.astype(v_SW.dtype)
    return lax.dot_general(
        p, v_SW, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32, precision=_exact(p)
    )


#: Bytes of the two buffers together; a core gives a kernel 16 MiB of VMEM for everything.
_BUFFER_BYTES = 4 << 20


def pages_of_block(pages: Pages, positions: int) -> int:
    """Pages that hold so many positions, or as many as there is room for twice.

    Half as many of float32, whose products take more room than the pages.
    """
    positions = positions // 2 if pages.dtype == jnp.float32 else positions
    _, _, heads, page_size, width = pages.shape
    page_bytes = heads * page_size * width * pages.dtype.itemsize
    return max(1, min(positions // page_size, _BUFFER_BYTES // (2 * page_bytes)))


def scratch(pages: Pages, num_pages: int) -> list[Any]:
    """The two buffers of each array, and the semaphores."""
    buffers = [pltpu.VMEM((2, num_pages, *x.shape[2:]), x.dtype) for x in arrays_of(pages)]
    return [tuple(buffers), pltpu.SemaphoreType.DMA((2, len(buffers)))]


def cost(pages: Pages, batch: RaggedBatch, num_queries: int, num_heads: int) -> pl.CostEstimate:
    """As if every row filled its page table and every query saw half of it."""
    page_bytes = sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in arrays_of(pages))
    scored = num_queries * batch.page_table.shape[1] * pages.shape[3] // 2
    return pl.CostEstimate(
        flops=4 * scored * num_heads * (pages.shape[4] // 2),
        transcendentals=scored * num_heads,
        bytes_accessed=batch.page_table.size * page_bytes,
    )
