"""From the states of a sequence's tokens to one vector: which pooling is data, row by row.

All but the maximum are one weighted sum over the row's tokens; the maximum is computed only where
some row asks for it. Poolings as in sentence-transformers; "weightedmean" is SGPT's
(arXiv 2202.08904): the token at position p, from 0 on, weighs p + 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxserve.types import POOLINGS

_CLS, _MEAN, _MAX, _LAST, _WEIGHTED = range(len(POOLINGS))


def token_rows(starts: Int[Array, "R+1"], num_tokens: int) -> Int[Array, "T"]:
    """Row of each token; R for padding."""
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.searchsorted(starts[1:], tokens, side="right").astype(jnp.int32)


def pool(
    hidden: Float[Array, "T D"], starts: Int[Array, "R+1"], codes: Int[Array, "R"]
) -> Float32[Array, "R D"]:
    """One vector a row; zeros for rows without tokens.

    A row's result is added up in the order of its tokens: it does not depend on the other rows.

    Args:
        hidden: states, row r's at starts[r] : starts[r + 1].
        codes: index in `types.POOLINGS` of each row.
    """
    num_tokens, num_rows = hidden.shape[0], codes.shape[0]
    with jax.named_scope("pooling"):
        hidden = hidden.astype(jnp.float32)
        row = token_rows(starts, num_tokens)
        own = jnp.minimum(row, num_rows - 1)
        length = (starts[1:] - starts[:-1])[own]
        position = jnp.arange(num_tokens, dtype=jnp.int32) - starts[own]
        code = codes[own]
        count = length.astype(jnp.float32)
        weight = jnp.select(
            [code == _CLS, code == _LAST, code == _WEIGHTED],
            [
                (position == 0).astype(jnp.float32),
                (position == length - 1).astype(jnp.float32),
                (position + 1) / (count * (count + 1) / 2),
            ],
            1 / count,
        )
        summed = jax.ops.segment_sum(
            hidden * weight[:, None], row, num_rows, indices_are_sorted=True
        )

        def with_maxima() -> Float32[Array, "R D"]:
            largest = jax.ops.segment_max(hidden, row, num_rows, indices_are_sorted=True)
            return jnp.where(codes[:, None] == _MAX, largest, summed)

        return jax.lax.cond(jnp.any(codes == _MAX), with_maxima, lambda: summed)
