"""kv_update as one scatter a cache.

Math: pages[layer, token_pages[t], :, token_offsets[t]] = (key[t], value[t]), each in its half.
Shapes: pages [L, P, K, Z, W], W >= 2 H; keys and values [T, K, H].
Grid: XLA's scatter; T writes of K × W elements.
Traffic: read + write of T × K × W elements. In place where the pages are donated: the whole
    cache travels as one array (a scan carry, never xs/ys), and the scatter's index includes the
    layer; slicing the layer out first would copy it.
Numerics: a cast to the pages' dtype; quantized pages get codes, and scales by one more scatter.
Limits: tokens that share a place (padding, on the null page) are written in no set order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.quantized_pages import Pages, QuantizedPages, is_quantized, quantize


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Runs everywhere."""
    return None


def kv_update(
    pages: Pages,
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
    num_rows: int | None = None,
) -> Pages:
    """See `api.kv_update`."""
    place = layer, token_pages, slice(None), token_offsets
    with jax.named_scope("kv_update"):
        if not isinstance(pages, QuantizedPages):
            return _write(pages, place, k_new, v_new)
        (k_code, k_scale), (v_code, v_scale) = (quantize(x, pages.kind) for x in (k_new, v_new))
        codes = _write(pages.codes, place, k_code, v_code)
        lanes = token_offsets[:, None] + jnp.array([0, pages.scales.shape[-1] // 2], jnp.int32)
        rows = pages.scales.at[layer, token_pages[:, None], :, lanes]
        scales = rows.set(jnp.stack([k_scale, v_scale], axis=1), mode="drop")
        return QuantizedPages(codes, scales, pages.kind)


def _write(
    pages: Num[Array, "L P K Z W"],
    place: tuple[Any, ...],
    k_new: Num[Array, "T K H"],
    v_new: Num[Array, "T K H"],
) -> Num[Array, "L P K Z W"]:
    unused = ((0, 0), (0, 0), (0, pages.shape[-1] // 2 - k_new.shape[-1]))
    halves = [jnp.pad(new.astype(pages.dtype), unused) for new in (k_new, v_new)]
    return pages.at[place].set(jnp.concatenate(halves, axis=-1), mode="drop")


def empty_pages(shape: tuple[int, ...], dtype: DTypeLike, scales_width: int = 0) -> Pages:
    """Zeros: XLA has no allocation that it does not fill.

    Args:
        scales_width: C of `QuantizedPages`; twice the page size where it is 0.
    """
    if not is_quantized(dtype):
        return jnp.zeros(shape, dtype)
    scales = jnp.zeros((*shape[:3], scales_width or 2 * shape[3]), jnp.float32)
    return QuantizedPages(jnp.zeros(shape, jnp.int8), scales, jnp.dtype(dtype).name)
