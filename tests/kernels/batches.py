"""Random ragged batches over pages, for the tests of every attention backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_pages import QuantizedPages, is_quantized, quantize
from pallas_kernels.ragged import RaggedBatch

DECODE = [(1, 7), (1, 1), (0, 0), (1, 130), (1, 16), (1, 17), (0, 40), (1, 300)]
#: As decode programs have it: token t is row t's, empty rows come last.
ALIGNED = [(1, 7), (1, 300), (1, 64), (0, 0), (0, 40)]
MIXED = [(1, 33), (1, 257), (70, 70), (0, 0), (5, 130), (1, 1), (128, 200), (2, 2), (65, 300)]


@dataclass(kw_only=True)
class Case:
    """A random batch; `lens` is (query_len, context_len) a row."""

    lens: list[tuple[int, int]]
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    page_size: int = 16
    padding: int = 0
    window: int | None = None
    soft_cap: float | None = None
    num_layers: int = 2
    max_query_len: int | None = None
    aligned: bool = False  # padding must then be as many tokens as there are empty rows
    dtype: str = "float32"
    sinks: bool = False
    unused: int = 0  # lanes behind each key and each value
    unused_value: float = np.nan  # what is in them
    scales_width: int = 0  # twice the page size where it is 0

    def arrays(self, seed: int) -> dict[str, Any]:
        """Inputs; whatever nobody may look at is NaN."""
        rng = np.random.default_rng(seed)
        page_counts = [-(-c // self.page_size) for _, c in self.lens]
        max_pages = max([*page_counts, 1]) + 2
        num_pages = sum(page_counts) + 3
        shape = (self.num_layers, num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        free = list(rng.permutation(np.arange(1, num_pages)))
        k, v = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        table = np.zeros((len(self.lens), max_pages), np.int32)
        for row, (query_len, context_len) in enumerate(self.lens):
            first_seen = 0 if self.window is None else context_len - query_len + 1 - self.window
            for position in range(max(first_seen, 0), context_len if query_len else 0):
                index, offset = divmod(position, self.page_size)
                if table[row, index] == 0:
                    table[row, index] = free.pop()
                place = (slice(None), table[row, index], slice(None), offset)
                k[place] = rng.standard_normal(k[place].shape)
                v[place] = rng.standard_normal(v[place].shape)
        starts = np.cumsum([0, *(n for n, _ in self.lens)]).astype(np.int32)
        num_tokens = max(int(starts[-1]) + self.padding, 1)
        q = 2 * rng.standard_normal((num_tokens, self.num_heads, self.head_dim), np.float32)
        q[starts[-1] :] = np.nan
        batch = RaggedBatch(
            page_table=jnp.asarray(table),
            query_starts=jnp.asarray(starts),
            context_lens=jnp.asarray([c for _, c in self.lens], jnp.int32),
            max_query_len=self.max_query_len or max([n for n, _ in self.lens] + [1]),
            aligned=self.aligned,
        )
        unused = np.full((*shape[:-1], self.unused), self.unused_value, np.float32)
        pages = jnp.asarray(np.concatenate([k, unused, v, unused], axis=-1))
        pages = (
            quantized(pages, self.dtype, self.scales_width)
            if is_quantized(self.dtype)
            else pages.astype(self.dtype)
        )
        arrays = {"q": jnp.asarray(q), "pages": pages, "batch": batch}
        if self.sinks:
            arrays["sinks"] = jnp.asarray(2 * rng.standard_normal(self.num_heads), jnp.float32)
        return arrays

    @property
    def options(self) -> dict[str, Any]:
        return {
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "soft_cap": self.soft_cap,
        }


def quantized(pages: Any, dtype: str, width: int = 0) -> QuantizedPages:
    """Pages as codes; what is NaN has NaN for its scale.

    Args:
        width: of a row of scales; twice the page size where it is 0.
    """
    halves = pages.reshape(*pages.shape[:-1], 2, -1)
    codes, scales = quantize(jnp.nan_to_num(halves), dtype)
    scales = jnp.where(jnp.isnan(halves).any(-1), jnp.nan, scales)
    unused = ((0, 0),) * 4 + ((0, (width or 2 * pages.shape[3]) // 2 - pages.shape[3]),)
    scales = jnp.pad(jnp.swapaxes(scales, -1, -2), unused, constant_values=jnp.nan)
    scales = scales.reshape(*pages.shape[:3], -1)
    return QuantizedPages(codes.reshape(pages.shape), scales, dtype)


def relative_error(out: Any, expected: Any) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / max(float(np.linalg.norm(expected)), 1e-30))
