"""What the sampler keeps on the device for every slot: settings, lists, and the tokens seen.

Written by `slots.apply_writes` when a sequence takes a slot and by `history.observe` as tokens
enter the model; read by `sample.sample`. Donated and returned by the step program like the cache.

Layout: everything a plain request needs is one row of `settings`, so that taking a slot is one
small scatter and reading it one small gather. The large arrays (token counts, lists, masks) are
only meaningful for slots whose FLAGS say so: they are neither shipped, reset nor read for others.
Slot max_rows is scratch, where padding rows point; it never has flags.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt

from jaxserve.types import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
)

#: End-of-sequence ids a model may declare; with the request's stop ids they fill `end_ids`.
MAX_EOS_TOKEN_IDS = 32
MAX_END_TOKEN_IDS = MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS

#: `counts` holds output tokens in its low 15 bits and prompt presence in the top bit. Counts stop
#: growing here: far above where a frequency penalty still changes anything, and low enough that
#: one step's tokens (at most as many again) cannot carry into the top bit.
MAX_COUNT = 1 << 14
PROMPT_BIT = 1 << 15


class Flag(enum.IntFlag):
    """Which parts of the sampler a slot needs."""

    SAMPLES = 1  # temperature > 0
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    PENALTIES = 16  # any of presence, frequency, repetition: tokens are counted
    BIAS = 32
    BAD_WORDS = 64  # the last tokens are remembered
    MIN_TOKENS = 128
    ALLOWED = 256

    ADJUSTS = PENALTIES | BIAS | BAD_WORDS | MIN_TOKENS | ALLOWED  # changes logits
    LISTS = BIAS | BAD_WORDS | MIN_TOKENS | ALLOWED  # has arrays beside its settings


class Column(enum.IntEnum):
    """Columns of `settings`: int32, others by their bits."""

    FLAGS = 0
    TEMPERATURE = 1
    TOP_K = 2
    TOP_P = 3
    MIN_P = 4
    PRESENCE = 5
    FREQUENCY = 6
    REPETITION = 7
    SEED_LOW = 8
    SEED_HIGH = 9
    CHOICE = 10
    PROMPT_LEN = 11
    MIN_LEN = 12  # position before which no end token is sampled


NUM_COLUMNS = len(Column)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """State of all slots; S = max_rows, row S is scratch.

    Attributes:
        settings: one row a slot, columns as `Column`.
        counts: times each token was output, and whether it is in the prompt (see PROMPT_BIT).
        recent: the last tokens, the one at position p in column p % MAX_BAD_WORD_TOKENS; -1: none.
        bias_ids, bias_values: logit_bias; ids of V and above are padding.
        bad_words: each right-aligned, padded with -1 in front; all -1 where there is none.
        end_ids: tokens ruled out until min_tokens; ids of V and above are padding.
        allowed: bit v % 32 of word v // 32 says whether token v may be sampled.
    """

    settings: Int[Array, "S+1 C"]
    counts: UInt[Array, "S+1 V"]
    recent: Int[Array, "S+1 8"]
    bias_ids: Int[Array, "S+1 512"]
    bias_values: Float[Array, "S+1 512"]
    bad_words: Int[Array, "S+1 64 8"]
    end_ids: Int[Array, "S+1 64"]
    allowed: UInt[Array, "S+1 V/32"]


def init_state(max_rows: int, vocab_size: int) -> SamplingState:
    """State of `max_rows` slots and the scratch slot, all greedy and without history."""
    rows = max_rows + 1
    return SamplingState(
        settings=jnp.zeros((rows, NUM_COLUMNS), jnp.int32),
        counts=jnp.zeros((rows, vocab_size), jnp.uint16),
        recent=jnp.full((rows, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
        bias_ids=jnp.full((rows, MAX_LOGIT_BIAS), vocab_size, jnp.int32),
        bias_values=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32),
        bad_words=jnp.full((rows, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
        end_ids=jnp.full((rows, MAX_END_TOKEN_IDS), vocab_size, jnp.int32),
        allowed=jnp.zeros((rows, num_mask_words(vocab_size)), jnp.uint32),
    )


def num_mask_words(vocab_size: int) -> int:
    """32-bit words that hold one bit for each token."""
    return -(-vocab_size // 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """The settings of a step's rows, with their types; `flags` is 0 for rows that are not live."""

    flags: Int[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    repetition: Float[Array, "B"]
    seed_low: UInt[Array, "B"]
    seed_high: UInt[Array, "B"]
    choice: UInt[Array, "B"]
    min_len: Int[Array, "B"]

    def has(self, flag: Flag) -> Array:
        """Which rows have (one of) these flags."""
        return (self.flags & int(flag)) != 0

    def any_has(self, flag: Flag) -> Array:
        """Whether any row has (one of) these flags."""
        return jnp.any(self.has(flag))


def read_settings(state: SamplingState, slots: Int[Array, "B"], live: Array) -> RowSettings:
    """The settings of `slots`."""
    rows = state.settings[slots]

    def column(index: Column, dtype: DTypeLike = jnp.int32) -> Array:
        return jax.lax.bitcast_convert_type(rows[:, index], dtype)

    return RowSettings(
        flags=jnp.where(live, column(Column.FLAGS), 0),
        temperature=column(Column.TEMPERATURE, jnp.float32),
        top_k=column(Column.TOP_K),
        top_p=column(Column.TOP_P, jnp.float32),
        min_p=column(Column.MIN_P, jnp.float32),
        presence=column(Column.PRESENCE, jnp.float32),
        frequency=column(Column.FREQUENCY, jnp.float32),
        repetition=column(Column.REPETITION, jnp.float32),
        seed_low=column(Column.SEED_LOW, jnp.uint32),
        seed_high=column(Column.SEED_HIGH, jnp.uint32),
        choice=column(Column.CHOICE, jnp.uint32),
        min_len=column(Column.MIN_LEN),
    )
