"""Probability mass as integers, so that sums are exact and do not depend on their order.

A float sum over the vocabulary may differ in its last bit between two batch sizes, between one
device and a vocabulary sharded over several; a token near the edge of its interval would flip.
Here a token's weight is exp((logit - max) / temperature) in units of 2**-26, an integer; every sum
is exact, so results are equal bit for bit wherever the weights are.

What lies below 2**-27 of the best token's probability has no weight: less than a float32 cumulative
sum (2**-24) would lose.

The vocabulary is cut into NUM_PARTS runs of equal length; block j is the j-th token of each run. So
a block's sum is a sum over the outer of two axes, which vectorises over blocks, shards over runs
and fits uint32. Sums over blocks are `Mass`es of 45 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt

NUM_PARTS = 32
UNIT = float(1 << 26)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Mass:
    """high × 2**16 + low, low < 2**16."""

    high: UInt[Array, "*B"]
    low: UInt[Array, "*B"]

    def __lt__(self, other: Mass) -> Bool[Array, "*B"]:
        same = (self.high == other.high) & (self.low < other.low)
        return (self.high < other.high) | same

    def is_zero(self) -> Bool[Array, "*B"]:
        """Whether there is none."""
        return (self.high | self.low) == 0


def in_blocks(values: Array, fill: float) -> Array:
    """[B, V] as [B, NUM_PARTS, V / NUM_PARTS], padded with `fill`."""
    num_rows, vocab_size = values.shape
    padding = -vocab_size % NUM_PARTS
    if padding:
        values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=fill)
    return values.reshape(num_rows, NUM_PARTS, -1)


def weigh(
    logits: Float[Array, "B ..."], best: Float[Array, "B"], sharpness: Float[Array, "B"]
) -> UInt[Array, "B ..."]:
    """Weights of tokens, at most UNIT: that of a logit equal to `best`.

    Args:
        best: the row's largest logit.
        sharpness: 1 / temperature.
    """
    expand = (slice(None), *([None] * (logits.ndim - 1)))
    relative = jnp.exp((logits - best[expand]) * sharpness[expand])
    return (relative * UNIT + 0.5).astype(jnp.int32).astype(jnp.uint32)


def total(sums: UInt[Array, "B J"]) -> Mass:
    """Sum over the last axis, of at most 2**16 entries."""
    return _carry(jnp.sum(sums >> 16, axis=-1), jnp.sum(sums & 0xFFFF, axis=-1))


def cumulative(sums: UInt[Array, "B J"]) -> Mass:
    """Running sum over the last axis, each entry included."""
    return _carry(jnp.cumsum(sums >> 16, axis=-1), jnp.cumsum(sums & 0xFFFF, axis=-1))


def _carry(high: Array, low: Array) -> Mass:
    return Mass(high=high + (low >> 16), low=low & 0xFFFF)


def scale(mass: Mass, fraction: UInt[Array, "B"]) -> Mass:
    """floor(mass × fraction / 2**32)."""
    # Schoolbook multiplication in 16-bit digits; mass has three (high is < 2**29).
    digits = (mass.low, mass.high & 0xFFFF, mass.high >> 16)
    f_low, f_high = fraction & 0xFFFF, fraction >> 16
    result, carry = [], jnp.zeros_like(fraction)
    for place in range(5):
        terms = [carry]
        if place < 3:
            terms.append(digits[place] * f_low)
        if 0 < place <= 3:
            terms.append(digits[place - 1] * f_high)
        # Each product is < 2**32: add its digits, so that nothing overflows.
        column = sum((term & 0xFFFF for term in terms), jnp.zeros_like(fraction))
        carry = sum((term >> 16 for term in terms), column >> 16)
        result.append(column & 0xFFFF)
    return Mass(high=result[3] | (result[4] << 16), low=result[2])
