"""A draw from each row's truncated distribution, in two or three passes over the logits.

Weights exp((logit - best) / temperature) are written once and summed by block (see `blocks`);
group g is every G-th block. A draw picks a group by its summed weight, a block in the group and a
token in the block, each with its own random bits.

The nucleus top_p is drawn from by rejection: draw from all that is left; if the weight strictly
above the drawn token is less than top_p of the whole, the token is in the nucleus. Else neither it
nor anything below it is, only what is above it is left, and the sums of the test serve the next
draw. That is exactly a draw from the nucleus, and tokens that tie with its last one are in it.

A row's token must not depend on its company, so nothing here depends on the order in which a
compiler would sum: float sums are written out as additions in a fixed order (`blocks.fold`), picks
are made among integers, and random bits are keyed by (seed, choice, position, trial).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxserve.sampling.bits import threefry
from jaxserve.sampling.blocks import fold, in_blocks
from jaxserve.sampling.state import Flag, RowSettings
from jaxserve.sampling.truncate import kth_largest

_BLOCKS_OF_GROUP = 64
_CHOICE_BITS = 8  # of the counter word that also holds the trial; MAX_CHOICES fits


def draw(
    logits: Float[Array, "B V"], settings: RowSettings, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """A token of each row, by its temperature, min_p, top_k and top_p; row by row independent."""
    blocks = in_blocks(logits.astype(jnp.float32))
    weights = _weigh(blocks, jnp.max(logits, axis=1).astype(jnp.float32), settings)

    def pick(above: Float[Array, "B"], sums: Float[Array, "B J"], trial: Int[Array, ""]):
        return _pick_token(weights, above, sums, _random_words(settings, positions, trial))

    sums = fold(weights)
    nucleus = settings.top_p * _total(sums)

    def retry(carry):
        pending, tokens, values, trial = carry
        left = fold(weights, lambda part: jnp.where(part > values[:, None], part, 0.0))
        left_total = _total(left)
        pending &= (left_total > 0) & (left_total >= nucleus)
        new_tokens, new_values = pick(values, left, trial)
        tokens = jnp.where(pending, new_tokens, tokens)
        values = jnp.where(pending, new_values, values)
        return pending, tokens, values, trial + 1

    everything = jnp.zeros_like(nucleus)
    first = (settings.has(Flag.TOP_P), *pick(everything, sums, jnp.int32(0)), jnp.int32(1))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), retry, first)[1]


def _weigh(
    blocks: Float[Array, "B P J"], best: Float[Array, "B"], settings: RowSettings
) -> Float[Array, "B P J"]:
    """Probabilities relative to the best token's; 0 for tokens that top_k or min_p drops."""
    best = jnp.where(best > -jnp.inf, best, 0.0)  # nothing is allowed: all weights are 0
    sharpness = jnp.where(settings.has(Flag.SAMPLES), 1.0 / settings.temperature, 1.0)
    min_p = jnp.where(settings.has(Flag.MIN_P), settings.min_p, 0.0)

    def weigh() -> Float[Array, "B P J"]:
        weights = jnp.exp((blocks - best[:, None, None]) * sharpness[:, None, None])
        return jnp.where(weights >= min_p[:, None, None], weights, 0.0)

    def weigh_top_k() -> Float[Array, "B P J"]:
        k = jnp.where(settings.has(Flag.TOP_K), settings.top_k, 0)
        threshold = kth_largest(blocks, best, k)
        return jnp.where(blocks >= threshold[:, None, None], weigh(), 0.0)

    return jax.lax.cond(settings.any_has(Flag.TOP_K), weigh_top_k, weigh)


def _total(sums: Float[Array, "B J"]) -> Float[Array, "B"]:
    return fold(fold(_in_groups(sums)))


def _in_groups(sums: Float[Array, "B J"]) -> Float[Array, "B L G"]:
    num_rows, num_blocks = sums.shape
    length = min(_BLOCKS_OF_GROUP, num_blocks)
    return jnp.pad(sums, ((0, 0), (0, -num_blocks % length))).reshape(num_rows, length, -1)


def _random_words(
    settings: RowSettings, positions: Int[Array, "B"], trial: Int[Array, ""]
) -> tuple[UInt[Array, "B"], ...]:
    """Random words of one trial: at least the three that it takes."""
    key = (settings.seed_low, settings.seed_high)
    place = positions.astype(jnp.uint32)
    block = trial.astype(jnp.uint32) * 2
    words = ()
    for offset in range(2):
        counter = settings.choice | ((block + jnp.uint32(offset)) << _CHOICE_BITS)
        words += threefry(key, (place, counter))
    return words


def _pick_token(
    weights: Float[Array, "B P J"],
    above: Float[Array, "B"],
    sums: Float[Array, "B J"],
    words: tuple[UInt[Array, "B"], ...],
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """A token among those heavier than `above`, whose sums by block are `sums`; and its weight."""
    groups = _in_groups(sums)
    group = _pick(fold(groups), words[0])
    of_group = jnp.take_along_axis(groups, group[:, None, None], axis=2)[:, :, 0]
    block = _pick(of_group, words[1]) * groups.shape[2] + group
    of_block = jnp.take_along_axis(weights, block[:, None, None], axis=2)[:, :, 0]
    of_block = jnp.where(of_block > above[:, None], of_block, 0.0)
    part = _pick(of_block, words[2])
    value = jnp.take_along_axis(of_block, part[:, None], axis=1)[:, 0]
    return part * weights.shape[2] + block, value


def _pick(weights: Float[Array, "B N"], word: UInt[Array, "B"]) -> Int[Array, "B"]:
    """An index by its share of the weights; never one whose weight is 0.

    Weights are rounded to integers in units of the largest one's 2**-24 or so, whose cumulative
    sums are exact.
    """
    num = weights.shape[1]
    unit = float(1 << (31 - (num - 1).bit_length()))
    largest = jnp.max(weights, axis=1, keepdims=True)
    shares = weights * (unit / jnp.where(largest > 0, largest, 1.0))
    shares = (shares + 0.5).astype(jnp.int32).astype(jnp.uint32)
    before = jnp.arange(num)[:, None] >= jnp.arange(num)[None]
    ends = jnp.sum(jnp.where(before, shares[:, None], 0), axis=2, dtype=jnp.uint32)
    point = _high_product(ends[:, -1], word)
    return jnp.minimum(jnp.sum(ends <= point[:, None], axis=1, dtype=jnp.int32), num - 1)


def _high_product(a: UInt[Array, "B"], b: UInt[Array, "B"]) -> UInt[Array, "B"]:
    """floor(a × b / 2**32)."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)  # < 2**32
    other = a_low * b_high + (middle & 0xFFFF)  # < 2**32
    return a_high * b_high + (middle >> 16) + (other >> 16)
