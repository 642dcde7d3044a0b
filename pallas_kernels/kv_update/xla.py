"""kv_update as one scatter a cache.

Math: pages[layer, token_pages[t], :, token_offsets[t]] = new[t].
Shapes: pages [L, P, K, Z, H], new [T, K, H].
Grid: XLA's scatter; T writes of K × H elements.
Traffic: 2 × (read + write) of T × K × H elements. In place where the pages are donated: the whole
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
    k_pages: Float[Array, "L P K Z H"],
    v_pages: Float[Array, "L P K Z H"],
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
) -> tuple[Float[Array, "L P K Z H"], Float[Array, "L P K Z H"]]:
    """See `api.kv_update`."""
    with jax.named_scope("kv_update"):

        def write(pages: Array, new: Array) -> Array:
            place = pages.at[layer, token_pages, :, token_offsets]
            return place.set(new.astype(pages.dtype), mode="drop")

        return write(k_pages, k_new), write(v_pages, v_new)


def empty_pages(shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "L P K Z H"]:
    """Zeros: XLA has no allocation that it does not fill."""
    return jnp.zeros(shape, dtype)
