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
from jaxtyping import Array, Bool, Float, Int

from jaxserve.sampling.adjust import adjust_logits
from jaxserve.sampling.draw import draw, weigh
from jaxserve.sampling.state import Flag, SamplingState, read_settings

_BLOCK = 256


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
    adjusts = settings.any_has(Flag.ADJUSTS)
    samples = settings.any_has(Flag.SAMPLES)

    def choose() -> Int[Array, "B"]:
        # A new array, to be changed in place. Were it the caller's, it would be copied before the
        # branches, for greedy batches too. Only -inf changes: to another value without weight.
        changed = jnp.maximum(logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        changed = jax.lax.cond(
            adjusts,
            lambda: adjust_logits(changed, state, slots, positions, settings),
            lambda: changed,
        )
        best = jax.lax.cond(
            jnp.all(settings.has(Flag.SAMPLES)),
            lambda: jnp.zeros_like(positions),
            lambda: greedy(changed),
        )
        return jax.lax.cond(samples, lambda: drawn_or(best, changed), lambda: best)

    def drawn_or(best: Int[Array, "B"], changed: Float[Array, "B V"]) -> Int[Array, "B"]:
        drawn = draw(weigh(changed, settings), settings, positions)
        return jnp.where(settings.has(Flag.SAMPLES), drawn, best)

    return jax.lax.cond(adjusts | samples, choose, lambda: greedy(logits))


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
