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
from jaxserve.sampling.blocks import NUM_PARTS, fold, halve, in_runs
from jaxserve.sampling.state import Flag, RowSettings
from jaxserve.sampling.truncate import kth_largest

_BLOCKS_OF_GROUP = 64
_CHOICE_BITS = 8  # of the counter word that also holds the trial; MAX_CHOICES fits


def draw(
    weights: Float[Array, "B W"], settings: RowSettings, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """A token of each row from the nucleus top_p of its weights (`weigh`)."""
    rejects = settings.has(Flag.TOP_P)

    def attempt(carry):
        trial, nucleus, pending, tokens, above = carry
        left = fold(weights, lambda run: jnp.where(run > above[:, None], run, 0.0))
        total = halve(halve(_in_groups(left)))
        first = trial == 0
        nucleus = jnp.where(first, settings.top_p * total, nucleus)
        # what is above the last token tells whether it was in the nucleus
        pending &= first | ((total > 0) & (total >= nucleus))
        words = _random_words(settings, positions, trial)
        new_tokens, new_above = _pick_token(weights, above, left, words)
        tokens = jnp.where(pending, new_tokens, tokens)
        above = jnp.where(pending, new_above, above)
        return trial + 1, nucleus, pending & rejects, tokens, above

    nothing = jnp.zeros_like(settings.top_p)
    start = (
        jnp.int32(0),
        nothing,
        jnp.ones_like(rejects),
        jnp.zeros_like(positions),
        nothing,
    )
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), attempt, start)[3]


def weigh(logits: Float[Array, "B V"], settings: RowSettings) -> Float[Array, "B W"]:
    """Probabilities relative to the best token's, in runs; 0 for tokens top_k or min_p drops."""
    logits = in_runs(logits)
    best = jnp.max(logits, axis=1)
    best = jnp.where(best > -jnp.inf, best, 0.0)  # nothing is allowed: all weights are 0
    sharpness = jnp.where(settings.has(Flag.SAMPLES), 1.0 / settings.temperature, 1.0)
    min_p = jnp.where(settings.has(Flag.MIN_P), settings.min_p, 0.0)
    k = jnp.where(settings.has(Flag.TOP_K), settings.top_k, 0)
    threshold = jax.lax.cond(
        settings.any_has(Flag.TOP_K),
        lambda: kth_largest(logits, best, k),
        lambda: jnp.full_like(best, -jnp.inf),
    )
    weights = jnp.exp((logits - best[:, None]) * sharpness[:, None])
    kept = (logits >= threshold[:, None]) & (weights >= min_p[:, None])
    return jnp.where(kept, weights, 0.0)


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
    weights: Float[Array, "B W"],
    above: Float[Array, "B"],
    sums: Float[Array, "B J"],
    words: tuple[UInt[Array, "B"], ...],
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """A token among those heavier than `above`, whose sums by block are `sums`; and its weight."""
    groups = _in_groups(sums)
    group = _pick(halve(groups), words[0])
    of_group = jnp.take_along_axis(groups, group[:, None, None], axis=2)[:, :, 0]
    block = _pick(of_group, words[1]) * groups.shape[2] + group
    places = jnp.arange(NUM_PARTS, dtype=jnp.int32) * sums.shape[1] + block[:, None]
    of_block = jnp.take_along_axis(weights, places, axis=1)
    of_block = jnp.where(of_block > above[:, None], of_block, 0.0)
    part = _pick(of_block, words[2])
    value = jnp.take_along_axis(of_block, part[:, None], axis=1)[:, 0]
    return part * sums.shape[1] + block, value


def _pick(weights: Float[Array, "B N"], word: UInt[Array, "B"]) -> Int[Array, "B"]:
    """An index by its share of the weights; 0 if there are none, else one whose weight is not 0.

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
    index = jnp.sum(ends <= point[:, None], axis=1, dtype=jnp.int32)
    return jnp.where(index < num, index, 0)


def _high_product(a: UInt[Array, "B"], b: UInt[Array, "B"]) -> UInt[Array, "B"]:
    """floor(a × b / 2**32)."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)  # < 2**32
    other = a_low * b_high + (middle & 0xFFFF)  # < 2**32
    return a_high * b_high + (middle >> 16) + (other >> 16)
