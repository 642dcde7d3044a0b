"""The k-th largest logit of each row, without sorting.

A threshold t keeps the top k if exactly k logits are >= t, wherever in the gap between two
neighbours it lies; where logits tie, the tied value itself is the answer and all that tie are kept.
So a bracket (at least k logits >= low, fewer than k >= high) is narrowed until its count is k or no
float32 lies between its ends. A step guesses by interpolating the logarithm of the count, which
falls about linearly with the logit in the tail of a language model; every other step halves the
bracket among float32's bit patterns instead, so that 64 steps always suffice.

Two rounds: first among the largest logit of each of V / 32 blocks, a small array whose k-th largest
is a lower bound, close because the top tokens rarely share a block; then among all logits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.sampling.blocks import fold, runs


def kth_largest(
    logits: Float[Array, "B W"], best: Float[Array, "B"], k: Int[Array, "B"]
) -> Float[Array, "B"]:
    """A threshold for each row that exactly its k largest logits reach, and those that tie.

    Args:
        logits: whole runs (`blocks.in_runs`); padding is -inf.
        best: each row's largest logit, finite.
        k: at least 1 and less than the vocabulary; 0 for rows to leave alone, which get -inf.
    """
    nothing = jnp.full_like(best, -jnp.inf)
    block_best = functools.reduce(jnp.maximum, runs(logits))
    num_blocks = block_best.shape[1]
    bounded = (k > 0) & (k <= num_blocks)
    bound = _narrow(lambda t: jnp.sum(block_best >= t[:, None], axis=1), nothing, best, k, bounded)
    bound = jnp.where(bounded, bound, -jnp.inf)

    def count(threshold: Float[Array, "B"]) -> Int[Array, "B"]:
        by_block = fold(logits, lambda run: (run >= threshold[:, None]).astype(jnp.int32))
        return jnp.sum(by_block, axis=1)

    threshold = _narrow(count, bound, best, k, k > 0)
    return jnp.where(k > 0, threshold, -jnp.inf)


def _narrow(
    count,
    low: Float[Array, "B"],
    best: Float[Array, "B"],
    k: Int[Array, "B"],
    wanted: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """The largest threshold found that at least k values reach; exactly k unless some tie.

    Args:
        count: how many values of each row are >= a threshold.
        low: thresholds that at least k values reach.
        wanted: rows to look at.
    """
    target = jnp.log(k.astype(jnp.float32) - 0.5)

    def unfinished(low_count, low, high):
        return wanted & (low_count != k) & (low < high - 1)

    def go_on(carry):
        return jnp.any(unfinished(*carry[1:4]))

    def step(carry):
        turn, low_count, low, high, high_count = carry
        halfway = (low >> 1) + (high >> 1) + (low & high & 1)
        low_value, high_value = from_order(low), from_order(high)
        slope_low = jnp.log(low_count.astype(jnp.float32))
        slope_high = jnp.log(jnp.maximum(high_count.astype(jnp.float32), 0.5))
        part = (slope_low - target) / jnp.maximum(slope_low - slope_high, 1e-6)
        guess = low_value + (high_value - low_value) * jnp.clip(part, 0.0, 1.0)
        guessed = jnp.isfinite(guess) & (turn % 2 == 1)
        middle = jnp.where(guessed, order(guess), halfway)
        middle = jnp.clip(middle, low + 1, high - 1)
        first = turn == 0
        middle = jnp.where(first, low, middle)  # whose count is not known yet
        found = count(from_order(middle))
        active = unfinished(low_count, low, high)
        up, down = active & (first | (found >= k)), active & ~first & (found < k)
        return (
            turn + 1,
            jnp.where(up, found, low_count),
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(down, found, high_count),
        )

    unknown = jnp.full_like(k, -1)
    start = (jnp.int32(0), unknown, order(low), order(best) + 1, jnp.zeros_like(k))
    return from_order(jax.lax.while_loop(go_on, step, start)[2])


def order(values: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """Integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


def from_order(integers: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The floats of `order`."""
    bits = integers ^ ((integers >> 31) & 0x7FFF_FFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
