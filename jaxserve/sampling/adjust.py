"""What changes logits before a token is chosen: penalties, then biases, then what is ruled out.

Each part is behind a `lax.cond` on whether any row of the step has it, and leaves rows without it
bit for bit as they were.

Tokens outside `allowed_token_ids` get -inf. Bad words and end tokens before min_tokens get
RULED_OUT, which is finite: when they leave nothing else of the allowed tokens, they yield.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.sampling.state import (
    PROMPT_BIT,
    Flag,
    RowSettings,
    SamplingState,
)

RULED_OUT = -1e30


def adjust_logits(
    logits: Float[Array, "B V"],
    state: SamplingState,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    settings: RowSettings,
) -> Float[Array, "B V"]:
    """Logits after penalties, biases and masks.

    Args:
        positions: where the tokens sampled from these logits will stand.
    """

    def under(flag: Flag, change, logits):
        return jax.lax.cond(settings.any_has(flag), change, lambda logits: logits, logits)

    logits = under(Flag.PENALTIES, lambda x: _penalties(x, state, slots, settings), logits)
    logits = under(Flag.BIAS, lambda x: _bias(x, state, slots, settings), logits)
    logits = under(
        Flag.BAD_WORDS, lambda x: _bad_words(x, state, slots, positions, settings), logits
    )
    logits = under(
        Flag.MIN_TOKENS, lambda x: _min_tokens(x, state, slots, positions, settings), logits
    )
    return under(Flag.ALLOWED, lambda x: _allowed(x, state, slots, settings), logits)


def _penalties(logits, state, slots, settings):
    """Repetition (arXiv 1909.05858) over prompt and output, then OpenAI's over the output."""
    counts = state.counts[slots]
    output_counts = (counts & (PROMPT_BIT - 1)).astype(jnp.float32)
    repetition = settings.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    penalized = jnp.where(counts != 0, repeated, logits)
    penalized -= settings.frequency[:, None] * output_counts
    penalized -= settings.presence[:, None] * (output_counts > 0)
    return jnp.where(settings.has(Flag.PENALTIES)[:, None], penalized, logits)


def _bias(logits, state, slots, settings):
    rows = _rows_with(Flag.BIAS, settings)
    return logits.at[rows, state.bias_ids[slots]].add(state.bias_values[slots], mode="drop")


def _bad_words(logits, state, slots, positions, settings):
    """Rules out the last token of each word whose other tokens the history ends with."""
    words = state.bad_words[slots]
    recent = state.recent[slots]
    size = recent.shape[1]
    # history[:, j] is the token that would stand at index j of a word ending at `positions`
    places = positions[:, None] - (size - 1) + jnp.arange(size - 1)
    history = jnp.take_along_axis(recent, places % size, axis=1)
    history = jnp.where(places >= 0, history, -1)
    prefix, last = words[:, :, :-1], words[:, :, -1]
    matches = jnp.all((prefix < 0) | (prefix == history[:, None]), axis=2) & (last >= 0)
    ids = jnp.where(matches, last, logits.shape[1])
    return logits.at[_rows_with(Flag.BAD_WORDS, settings), ids].set(RULED_OUT, mode="drop")


def _min_tokens(logits, state, slots, positions, settings):
    too_early = positions < settings.min_len
    ids = jnp.where(too_early[:, None], state.end_ids[slots], logits.shape[1])
    return logits.at[_rows_with(Flag.MIN_TOKENS, settings), ids].set(RULED_OUT, mode="drop")


def _allowed(logits, state, slots, settings):
    words = state.allowed[slots]
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(words.shape[0], -1)[:, : logits.shape[1]] != 0
    without = ~settings.has(Flag.ALLOWED)
    return jnp.where(allowed | without[:, None], logits, -jnp.inf)


def _rows_with(flag, settings):
    """Index of each row; out of bounds, so that scatters drop it, where it lacks the flag."""
    num_rows = settings.flags.shape[0]
    return jnp.where(settings.has(flag), jnp.arange(num_rows), num_rows)[:, None]
