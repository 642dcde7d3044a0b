"""The oracle of grouped_matmul: every row fetches its group's matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "W K N"] | Int[Array, "W K N"],
    group_sizes: Int[Array, "E"],
    first_group: int | Int[Array, ""] = 0,
    scale: Float[Array, "E N"] | None = None,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`; holds a matrix for each row, so for small shapes only."""
    row = jnp.arange(x.shape[0])
    ends_E = jnp.cumsum(group_sizes)
    group_T = jnp.sum(ends_E[None, :] <= row[:, None], axis=1)
    live_T = group_T < len(group_sizes)
    group_T = jnp.where(live_T, group_T, 0)
    w_TKN = w[first_group + group_T].astype(jnp.float32)
    y_TN = jnp.einsum("tk,tkn->tn", x.astype(jnp.float32), w_TKN, precision=precision)
    if scale is not None:
        y_TN = y_TN * scale[group_T]
    return jnp.where(live_T[:, None], y_TN, 0).astype(x.dtype)
