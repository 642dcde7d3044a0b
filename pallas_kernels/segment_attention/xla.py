"""Segment attention in plain JAX: rows as a padded grid.

Math: softmax(scale q k') v within each row.
Shapes: qkv [T, 3, N, H] → a grid [R, S, 3, N, H] with S = max_len, and back.
Grid: one batched product over rows and heads.
Traffic: R × S tokens' queries, keys and values, and R × N × S² scores: callers keep R × S near T
    by giving rows of similar lengths a program of their own.
Numerics: scores and weights float32.
Limits: none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def unsupported(*, head_dim: int) -> str | None:
    """It runs everywhere."""
    return None


def segment_attention(
    qkv: Float[Array, "T 3 N H"], starts: Int[Array, "R+1"], *, scale: float, max_len: int
) -> Float[Array, "T N H"]:
    """See `api.segment_attention`."""
    num_tokens = qkv.shape[0]
    precision = jax.lax.Precision.HIGHEST if qkv.dtype == jnp.float32 else None
    with jax.named_scope("segment_attention"):
        place = jnp.arange(max_len, dtype=jnp.int32)
        tokens_RS = jnp.minimum(starts[:-1, None] + place, num_tokens - 1)
        live_RS = place < (starts[1:] - starts[:-1])[:, None]
        q, k, v = (qkv[:, part][tokens_RS] for part in range(3))
        scores = jnp.einsum(
            "rqnh,rknh->rnqk", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        # An empty row's tokens see whatever is there: nobody reads them, and no NaN comes of it.
        seen = live_RS | ~live_RS[:, :1]
        scores = jnp.where(seen[:, None, None], scale * scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("rnqk,rknh->rqnh", weights, v, precision=precision)
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        rows = jnp.searchsorted(starts[1:], tokens, side="right").astype(jnp.int32)
        rows = jnp.minimum(rows, starts.shape[0] - 2)
        return mixed[rows, jnp.clip(tokens - starts[rows], 0, max_len - 1)]
