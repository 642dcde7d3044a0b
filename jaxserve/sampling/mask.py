"""Rules out tokens by masks that the host made: of a step whose rows must match grammars.

Applied before anything else that changes logits. What is ruled out stays so: it gets the lowest
finite value that float32 has, which no bias lifts and penalties only push further down.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt


def mask_logits(logits: Float[Array, "B V"], masks: UInt[Array, "B W"]) -> Float[Array, "B V"]:
    """Logits of allowed tokens as they were, of all others -inf.

    Args:
        masks: bit v % 32 of word v // 32 says whether token v is allowed.
    """
    words = masks.shape[1]
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(masks.shape[0], words * 32)[:, : logits.shape[1]] != 0
    return jnp.where(allowed, logits, -jnp.inf)
