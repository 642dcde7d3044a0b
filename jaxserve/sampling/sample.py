"""Choosing each row's next token, every row with its own parameters, in one program.

Order: penalties, biases and masks (`adjust`); greedy rows (temperature 0) take the largest logit,
lowest id on ties; the others divide by the temperature, drop tokens below min_p, then all but the
top_k, then all but the nucleus top_p of what is left, and draw. A token that ties with the last one
kept is kept too, so that what is kept is always {logit >= threshold}.

A batch without sampled rows costs one argmax. There are no sorts: the k-th largest logit is found
by bisection over float32's bit patterns, and the nucleus by rejection: draw from all that is left,
accept if the mass strictly above the drawn token is less than top_p of the whole, else only what
is above it is left. That is exactly a draw from the nucleus (rejected tokens, and all below them,
are outside of it), and the sums of one pass serve both the test and the next draw.

A row's token is a function of its logits, its parameters and its position alone: sums are of
integers (see `mass`), and bits are keyed by (seed, choice, position).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.sampling import mass
from jaxserve.sampling.adjust import adjust_logits
from jaxserve.sampling.bits import threefry
from jaxserve.sampling.mass import Mass
from jaxserve.sampling.state import Flag, RowSettings, SamplingState, read_settings

_CHOICE_BITS = 8  # of the counter word that also holds the round; MAX_CHOICES fits


def sample(
    logits: Float[Array, "B V"],
    state: SamplingState,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    live: Bool[Array, "B"],
) -> Int[Array, "B"]:
    """The next token of each row; an arbitrary one where a row is not live.

    Args:
        slots: each row's slot, whose settings and history (`history.observe`) it follows.
        positions: where the tokens will stand in their sequences.
    """
    settings = read_settings(state, slots, live)
    adjusts = settings.any_has(Flag.ADJUSTS).astype(jnp.int32)
    samples = settings.any_has(Flag.SAMPLES).astype(jnp.int32)

    def adjusted() -> Float[Array, "B V"]:
        return adjust_logits(logits, state, slots, positions, settings)

    return jax.lax.switch(
        2 * adjusts + samples,
        (
            lambda: greedy(logits),
            lambda: _choose(logits, settings, positions),
            lambda: greedy(adjusted()),
            lambda: _choose(adjusted(), settings, positions),
        ),
    )


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Token with the largest logit; the lowest id among equals."""
    return jnp.argmax(logits, axis=1).astype(jnp.int32)


def _choose(
    logits: Float[Array, "B V"], settings: RowSettings, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    drawn = _draw(logits.astype(jnp.float32), settings, positions)
    is_greedy = ~settings.has(Flag.SAMPLES)
    best = jax.lax.cond(jnp.any(is_greedy), greedy, lambda _: drawn, logits)
    return jnp.where(is_greedy, best, drawn)


def _draw(
    logits: Float[Array, "B V"], settings: RowSettings, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    blocks = mass.in_blocks(logits, -jnp.inf)
    best = jnp.max(logits, axis=1)
    best = jnp.where(best > -jnp.inf, best, 0.0)
    sharpness = 1.0 / settings.temperature
    min_weight = jnp.where(settings.has(Flag.MIN_P), settings.min_p, 0.0) * mass.UNIT
    min_weight = jnp.ceil(min_weight).astype(jnp.int32).astype(jnp.uint32)
    floor = jax.lax.cond(
        settings.any_has(Flag.TOP_K),
        lambda: _kth_largest(blocks, best, settings),
        lambda: jnp.full_like(best, -jnp.inf),
    )
    key = (settings.seed_low, settings.seed_high)

    def weights(values: Float[Array, "B ..."], above: Float[Array, "B"]) -> UInt[Array, "B ..."]:
        """Of the tokens that are kept and lie above `above`; 0 for others."""
        expand = (slice(None), *([None] * (values.ndim - 1)))
        weight = mass.weigh(values, best, sharpness)
        kept = (values >= floor[expand]) & (values > above[expand]) & (weight >= min_weight[expand])
        return jnp.where(kept, weight, 0)

    def draw(sums: UInt[Array, "B J"], whole: Mass, above: Float[Array, "B"], trial: Array):
        """A token above `above`, and its logit."""
        counter = (
            positions.astype(jnp.uint32),
            settings.choice | (trial.astype(jnp.uint32) << _CHOICE_BITS),
        )
        point = mass.scale(whole, threefry(key, counter)[0])
        return _token_at(point, sums, lambda column: weights(column, above), blocks)

    def sum_blocks(above: Float[Array, "B"]) -> UInt[Array, "B J"]:
        return jnp.sum(weights(blocks, above), axis=1)

    everything = jnp.full_like(best, -jnp.inf)
    sums = sum_blocks(everything)
    whole = mass.total(sums)
    nucleus = mass.scale(whole, settings.top_p)

    def rejected(carry):
        return jnp.any(carry[0])

    def retry(carry):
        pending, tokens, values, trial = carry
        sums = sum_blocks(values)
        above = mass.total(sums)
        pending &= ~(above.is_zero() | (above < nucleus))
        new_tokens, new_values = draw(sums, above, values, trial)
        tokens = jnp.where(pending, new_tokens, tokens)
        values = jnp.where(pending, new_values, values)
        return pending, tokens, values, trial + 1

    tokens, values = draw(sums, whole, everything, jnp.int32(0))
    first = (settings.has(Flag.TOP_P), tokens, values, jnp.int32(1))
    return jax.lax.while_loop(rejected, retry, first)[1]


def _token_at(
    point: Mass, sums: UInt[Array, "B J"], weights, blocks: Float[Array, "B I J"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The token in whose stretch of the cumulative weights `point` lies, and its logit."""
    num_parts, num_blocks = blocks.shape[1:]
    ends = mass.cumulative(sums)
    passed = ~(Mass(high=point.high[:, None], low=point.low[:, None]) < ends)
    block = jnp.minimum(jnp.sum(passed, axis=1), num_blocks - 1)[:, None]

    def pick(values: Array) -> Array:
        return jnp.take_along_axis(values, block, axis=1)[:, 0]

    # point - (end - sum), which is within uint32
    rest = pick(sums) - (((pick(ends.high) - point.high) << 16) + pick(ends.low) - point.low)
    column = jnp.take_along_axis(blocks, block[:, :, None], axis=2)[:, :, 0]
    inner = jnp.cumsum(weights(column), axis=1)
    part = jnp.minimum(jnp.sum(inner <= rest[:, None], axis=1), num_parts - 1)
    value = jnp.take_along_axis(column, part[:, None], axis=1)[:, 0]
    return (part * num_blocks + block[:, 0]).astype(jnp.int32), value


def _kth_largest(
    blocks: Float[Array, "B I J"], best: Float[Array, "B"], settings: RowSettings
) -> Float[Array, "B"]:
    """Each row's top_k-th largest logit; -inf for rows without top_k."""
    wanted = jnp.where(settings.has(Flag.TOP_K), settings.top_k, 0)
    lowest = jnp.full_like(wanted, _order(jnp.float32(-jnp.inf)))

    def narrow(_, bracket):
        low, high = bracket
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        count = jnp.sum(blocks >= _from_order(middle)[:, None, None], axis=(1, 2))
        enough = count >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, narrow, (lowest, _order(best)))
    return jnp.where(wanted > 0, _from_order(low), -jnp.inf)


def _order(values: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """Integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


def _from_order(order: Int[Array, "*B"]) -> Float[Array, "*B"]:
    bits = order ^ ((order >> 31) & 0x7FFF_FFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
