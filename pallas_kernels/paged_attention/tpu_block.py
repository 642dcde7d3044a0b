"""Blocks of pages on a TPU: how they are moved to VMEM, and the products of one of them.

Shared by the decode and the chunk kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.ragged import RaggedBatch


class Block(NamedTuple):
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


def scores(q_XW: Array, k_SW: Array, visible: Array, score: Score) -> Array:
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
    return jnp.where(visible, s, LOWEST)


def _exact(x: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def weighted(p: Array, v_SW: Array) -> Array:
    p = p.astype(v_SW.dtype)
    return lax.dot_general(
        p, v_SW, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32, precision=_exact(p)
    )


#: Bytes of the two buffers together; a core gives a kernel 16 MiB of VMEM for everything.
_BUFFER_BYTES = 4 << 20


def pages_of_block(pages: Array, positions: int) -> int:
    """Pages that hold so many positions, or as many as there is room for twice."""
    _, _, heads, page_size, width = pages.shape
    page_bytes = heads * page_size * width * pages.dtype.itemsize
    return max(1, min(positions // page_size, _BUFFER_BYTES // (2 * page_bytes)))


def scratch(pages: Array, num_pages: int) -> list[Any]:
    _, _, heads, page_size, width = pages.shape
    return [
        pltpu.VMEM((2, num_pages, heads, page_size, width), pages.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def cost(pages: Array, batch: RaggedBatch, num_queries: int, num_heads: int) -> pl.CostEstimate:
    """As if every row filled its page table and every query saw half of it."""
    page_bytes = pages.size // pages.shape[0] // pages.shape[1] * pages.dtype.itemsize
    scored = num_queries * batch.page_table.shape[1] * pages.shape[3] // 2
    return pl.CostEstimate(
        flops=4 * scored * num_heads * (pages.shape[4] // 2),
        transcendentals=scored * num_heads,
        bytes_accessed=batch.page_table.size * page_bytes,
    )
