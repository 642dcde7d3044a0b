"""The oracle of paged attention: every token gathers its whole context, in float32.

Written for reading; memory is T × M × Z × K × H, so for small cases only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized_pages import Pages, QuantizedPages, dequantize
from pallas_kernels.ragged import RaggedBatch


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "T N H"]:
    """softmax(cap(scale q·k)) v for each token over the positions it may see; zeros for padding.

    A head's sink is one more score of its softmax, which has no value.
    """
    if isinstance(pages, QuantizedPages):
        pages = dequantize(pages)
    num_tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, width = pages.shape
    num_positions = batch.page_table.shape[1] * page_size

    rows = batch.token_rows(num_tokens)
    q_pos = batch.token_positions(num_tokens)[:, None]
    kv_pos = jnp.arange(num_positions, dtype=jnp.int32)[None, :]
    visible = (kv_pos <= q_pos) & batch.live_tokens(num_tokens)[:, None]
    if window is not None:
        visible &= kv_pos > q_pos - window

    def context(first: int) -> Array:
        """[T, K, S, H] from lane `first` on, zeros where the token does not look."""
        lanes = pages[layer][..., first : first + head_dim]
        x = lanes[batch.page_table[rows]].astype(jnp.float32)
        x = x.transpose(0, 2, 1, 3, 4).reshape(num_tokens, num_kv_heads, num_positions, head_dim)
        return jnp.where(visible[:, None, :, None], x, 0.0)

    q_TKGH = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)
    precision = jax.lax.Precision.HIGHEST
    s = scale * jnp.einsum("tkgh,tksh->tkgs", q_TKGH, context(0), precision=precision)
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(visible[:, None, None, :], s, -jnp.inf)
    top = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.where(visible[:, None, None, :], jnp.exp(s - jnp.where(top > -jnp.inf, top, 0.0)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1) - top)
    p = p / jnp.where(total > 0.0, total, 1.0)
    out = jnp.einsum("tkgs,tksh->tkgh", p, context(width // 2), precision=precision)
    out = jnp.where(batch.live_tokens(num_tokens)[:, None, None, None], out, 0.0)
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype)
