"""Kernels alone: every shape of `pallas_kernels/*/shapes.py` on every chip that it is for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels.kv_update import kv_update, page_width, scales_width
from pallas_kernels.kv_update.shapes import SHAPES as SHAPES_OF_UPDATES
from pallas_kernels.paged_attention import RaggedBatch, paged_attention, write_and_attend
from pallas_kernels.paged_attention.shapes import SHAPES, Shape, refusal
from pallas_kernels.quantized_pages import QuantizedPages, is_quantized

#: Backend and the chips that it is compiled for.
CHIPS = {"tpu": ("v5e:1x1", "v6e:1x1", "tpu7x:1x1x1"), "gpu": ("h100:1",)}
_NUM_PAGES = 4096
_NUM_LAYERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One shape of attention, or of the cache update before it, for one chip.

    Attributes:
        op: "paged_attention", "kv_update", or "write_and_attend", both in one.
        refusal: why the backend refuses it; None where it compiles.
    """

    op: str
    shape: Shape
    backend: str
    slice: str
    refusal: str | None

    @property
    def name(self) -> str:
        """Of the row, on the command line and in the table."""
        return f"{self.op}/{self.shape.name}/{self.slice}"

    @property
    def page_bytes(self) -> int:
        """Of all pages that the program is given."""
        pages = jax.tree.leaves(
            self._pages(lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype))
        )
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in pages)

    def _pages(self, array: Callable[..., Any]) -> Any:
        shape, dtype = self._pages_shape, self.shape.dtype
        if not is_quantized(dtype):
            return array(shape, jnp.dtype(dtype))
        scales = *shape[:3], scales_width(self.shape.page_size, self.backend)
        return QuantizedPages(array(shape, jnp.int8), array(scales, jnp.float32), dtype)

    @property
    def _pages_shape(self) -> tuple[int, ...]:
        shape = self.shape
        width = page_width(shape.head_dim, self.backend)
        return _NUM_LAYERS, _NUM_PAGES, shape.num_kv_heads, shape.page_size, width

    def program(self, device: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function that donates its first argument, the pages, and what it takes."""
        shape, place = self.shape, SingleDeviceSharding(device)

        def array(sizes: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        pages = self._pages(array)
        values = jnp.bfloat16 if is_quantized(shape.dtype) else pages.dtype
        tokens, rows = shape.num_tokens, shape.num_rows
        new = array((tokens, shape.num_kv_heads, shape.head_dim), values)
        places = array((tokens,), jnp.int32)
        if self.op == "kv_update":

            def write(pages: Any, *arrays: Any) -> Any:
                k, v, *where = arrays
                return kv_update(pages, k, v, 1, *where, num_rows=rows, backend=self.backend)

            return write, (pages, new, new, places, places)
        batch = RaggedBatch(
            page_table=array((rows, shape.max_context // shape.page_size), jnp.int32),
            query_starts=array((rows + 1,), jnp.int32),
            context_lens=array((rows,), jnp.int32),
            max_query_len=1 if tokens == rows else tokens,
            aligned=tokens == rows,
        )
        q = array((tokens, shape.num_heads, shape.head_dim), values)
        sinks = array((shape.num_heads,), jnp.float32) if shape.sinks else None
        if self.op == "write_and_attend":
            return partial(_write_and_attend, self), (pages, q, batch, sinks, new, new, places)
        return partial(_attend, self), (pages, q, batch, sinks)

    @property
    def options(self) -> dict[str, Any]:
        """Of both kinds of attention."""
        shape = self.shape
        return {
            "scale": shape.head_dim**-0.5,
            "window": shape.window,
            "soft_cap": shape.soft_cap,
            "backend": self.backend,
        }


def _attend(row: KernelRow, pages: Any, q: Any, batch: Any, sinks: Any) -> Any:
    return pages, paged_attention(q, pages, 1, batch, sinks=sinks, **row.options)


def _write_and_attend(
    row: KernelRow, pages: Any, q: Any, batch: Any, sinks: Any, k: Any, v: Any, places: Any
) -> Any:
    where = places, places
    return write_and_attend(q, k, v, pages, 1, batch, where, sinks=sinks, **row.options)


def _rows(backend: str) -> Iterator[KernelRow]:
    for slice, shape in itertools.product(CHIPS[backend], SHAPES):
        reason = refusal(backend, shape)
        place = {"shape": shape, "backend": backend, "slice": slice}
        yield KernelRow(op="paged_attention", refusal=reason, **place)
        is_decode = shape.num_tokens == shape.num_rows
        if backend == "gpu" and reason is None and is_decode and not is_quantized(shape.dtype):
            yield KernelRow(op="write_and_attend", refusal=None, **place)
    for slice in CHIPS[backend]:
        for shape in SHAPES_OF_UPDATES:
            yield KernelRow(op="kv_update", refusal=None, shape=shape, backend=backend, slice=slice)


ROWS_OF_KERNELS = tuple(row for backend in CHIPS for row in _rows(backend))
