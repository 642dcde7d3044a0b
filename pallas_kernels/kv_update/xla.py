"""kv_update as one scatter a cache.

Math: pages[layer, token_pages[t], :, token_offsets[t]] = (key[t], value[t]), each in its half.
Shapes: pages [L, P, K, Z, W], W >= 2 H; keys and values [T, K, H].
Grid: XLA's scatter; T writes of K × W elements.
Traffic: read + write of T × K × W elements. In place where the pages are donated: the whole
    cache travels as one array (a scan carry, never xs/ys), and the scatter's index includes the
    layer; slicing the layer out first would copy it.
Numerics: a cast to the pages' dtype.
Limits: tokens that share a place (padding, on the null page) are written in no set order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Runs everywhere."""
    return None


def kv_update(
    pages: Float[Array, "L P K Z W"],
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
) -> Float[Array, "L P K Z W"]:
    """See `api.kv_update`."""
    with jax.named_scope("kv_update"):
        unused = ((0, 0), (0, 0), (0, pages.shape[-1] // 2 - k_new.shape[-1]))
        halves = [jnp.pad(new.astype(pages.dtype), unused) for new in (k_new, v_new)]
        place = pages.at[layer, token_pages, :, token_offsets]
        return place.set(jnp.concatenate(halves, axis=-1), mode="drop")


def empty_pages(shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "L P K Z W"]:
    """Zeros: XLA has no allocation that it does not fill."""
    return jnp.zeros(shape, dtype)
