"""Choosing each row's next token, every row with its own parameters, in one program.

Order: penalties, biases and masks (`adjust`); rows of temperature 0 then take the largest logit,
the lowest id on ties; the others divide by the temperature, drop tokens below min_p, then all but
the top_k, then all but the nucleus top_p of what is left, and draw (`draw`). Tokens that tie with
the last one kept are kept.

A row's token is a function of its logits, its parameters, its history and its position alone: the
same in any row and any batch, bit for bit. A batch without sampled rows costs one pass over the
logits; what no row of the step asks for is neither computed nor read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.sampling.adjust import adjust_logits
from jaxserve.sampling.draw import draw, weigh
from jaxserve.sampling.mask import mask_logits
from jaxserve.sampling.spread import ONE_DEVICE, Spread
from jaxserve.sampling.spread import greedy as greedy_by_vocabulary
from jaxserve.sampling.state import Flag, SamplingState, read_settings

_BLOCK = 256


def sample(
    logits: Float[Array, "B V"],
    state: SamplingState,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    live: Bool[Array, "B"],
    spread: Spread = ONE_DEVICE,
    masks: UInt[Array, "B W"] | None = None,
) -> Int[Array, "B"]:
    """The next token of each row; an arbitrary one where a row is not live.

    Args:
        slots: each row's slot, whose settings and history (`history.observe`) it follows.
        positions: where the tokens will stand in their sequences.
        spread: how the logits lie on the devices.
        masks: of tokens that may be taken at all, as `mask_logits` has them.
    """
    choose, rows = _choose, (logits, slots, positions, live)
    if masks is not None:
        choose, rows = _choose_allowed, (*rows, masks)
    return jax.lax.cond(
        any_asks(state, slots, live, spread),
        lambda: spread.over_rows(choose, rows, state),
        lambda: sample_plainly(logits, spread, masks),
    )


def any_asks(
    state: SamplingState,
    slots: Int[Array, "B"],
    live: Bool[Array, "B"],
    spread: Spread = ONE_DEVICE,
) -> Bool[Array, ""]:
    """Whether any row wants more than the largest of its logits."""
    settings = read_settings(state, slots, live)
    return spread.anywhere(settings.any_has(Flag.ADJUSTS | Flag.SAMPLES))


def sample_plainly(
    logits: Float[Array, "B V"],
    spread: Spread = ONE_DEVICE,
    masks: UInt[Array, "B W"] | None = None,
) -> Int[Array, "B"]:
    """`sample` where no row asks for anything."""
    plain = greedy if not spread.axes else greedy_by_vocabulary
    return plain(logits if masks is None else mask_logits(logits, masks))


def _choose_allowed(
    logits: Float[Array, "B V"],
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    live: Bool[Array, "B"],
    masks: UInt[Array, "B W"],
    state: SamplingState,
) -> Int[Array, "B"]:
    """The same where masks rule tokens out, in one pass over the logits with `_choose`'s own."""
    return _choose(mask_logits(logits, masks), slots, positions, live, state)


def _choose(
    logits: Float[Array, "B V"],
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    live: Bool[Array, "B"],
    state: SamplingState,
) -> Int[Array, "B"]:
    """The next token of rows some of which have parameters."""
    settings = read_settings(state, slots, live)
    # A new array, to be changed in place. Were it the caller's, it would be copied before the
    # branches, for greedy batches too. Only -inf changes: to another value without weight.
    changed = jnp.maximum(logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    changed = jax.lax.cond(
        settings.any_has(Flag.ADJUSTS),
        lambda: adjust_logits(changed, state, slots, positions, settings),
        lambda: changed,
    )
    samples = settings.has(Flag.SAMPLES)
    best = jax.lax.cond(
        jnp.all(samples), lambda: jnp.zeros_like(positions), lambda: greedy(changed)
    )

    def drawn_or_best() -> Int[Array, "B"]:
        drawn = draw(weigh(changed, settings), settings, positions)
        return jnp.where(samples, drawn, best)

    return jax.lax.cond(jnp.any(samples), drawn_or_best, lambda: best)


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Token with the largest logit; the lowest id among equals.

    By blocks of neighbours: maxima are one pass at memory speed, which `jnp.argmax` is not.
    """
    num_rows, vocab_size = logits.shape
    size = min(_BLOCK, vocab_size)
    padding = -vocab_size % size
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    blocks = logits.reshape(num_rows, -1, size)
    block_best = jnp.max(blocks, axis=2)
    best = jnp.max(block_best, axis=1, keepdims=True)
    block = _first(block_best == best)
    of_block = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * size + _first(of_block == best)


def _first(values: Bool[Array, "B N"]) -> Int[Array, "B"]:
    """Index of the first true value of each row; 0 where there is none."""
    num = values.shape[1]
    index = jnp.min(jnp.where(values, jnp.arange(num, dtype=jnp.int32), num), axis=1)
    return jnp.where(index < num, index, 0)
