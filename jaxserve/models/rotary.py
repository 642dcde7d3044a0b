"""Rotary position embedding, in the rotate-half layout, with the scalings of long-context models.

Math: pair (i, i + H/2) of a head turns by the angle position × f[i], f[i] = theta^(-2i/H).
`linear` divides f by `factor`; `llama3` divides only slow frequencies (wavelength above
original_context / low_freq_factor), keeps fast ones (below original_context / high_freq_factor)
and interpolates between. Source: RoFormer (arXiv 2104.09864), Llama 3.1's reference code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary embedding.

    Attributes:
        theta: the base.
        scaling: "default", "linear" or "llama3".
        factor: how much longer the context was made; 1 with "default".
        low_freq_factor, high_freq_factor, original_context: of "llama3".
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "H/2"]:
        """Radians a position, of each pair."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (np.float32(1.0) / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.scaling == "default":
            return plain
        slow = plain / np.float32(self.factor)
        if self.scaling == "linear":
            return slow
        wavelengths = 2 * math.pi / plain
        share = (self.original_context / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        share = np.clip(share, 0.0, 1.0)
        return ((1 - share) * slow + share * plain).astype(np.float32)


def rotary_table(
    rope: Rope, head_dim: int, positions: Int[Array, "T"]
) -> tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]]:
    """Cosine and sine of each token's angles, float32."""
    angles = positions.astype(jnp.float32)[:, None] * rope.frequencies(head_dim)
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(
    x: Float[Array, "T A B H"], table: tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]]
) -> Float[Array, "T A B H"]:
    """Turns every head of token t by t's angles; computed in float32, returned in x's dtype."""
    cos, sin = (part[:, None, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
