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
from jaxserve.sampling.draw import draw
from jaxserve.sampling.state import Flag, RowSettings, SamplingState, read_settings

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


def _choose(
    logits: Float[Array, "B V"], settings: RowSettings, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    drawn = draw(logits, settings, positions)
    is_greedy = ~settings.has(Flag.SAMPLES)
    best = jax.lax.cond(jnp.any(is_greedy), lambda: greedy(logits), lambda: drawn)
    return jnp.where(is_greedy, best, drawn)
