"""Sequences taking slots: their sampling parameters, packed by the host, stored by the device.

`pack_writes` (numpy only) runs when sequences join; `apply_writes` is a small program of its own
or the first part of the step. A join with plain parameters ships one row of `settings`; the lists
(biases, bad words, end tokens, allowed tokens) travel only in calls where some join has them.

Sizes are few, so that few programs exist: `padding_writes` gives one input for each, for warm-up.
Values are trusted: `engine.check` has seen them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxserve.sampling.state import (
    MAX_END_TOKEN_IDS,
    NUM_COLUMNS,
    Flag,
    SamplingState,
    num_mask_words,
)
from jaxserve.types import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    SamplingParams,
)

#: Writes that a call of the smaller size holds.
SMALL_WRITES = 8

#: Smaller temperatures are kept at this: sharper than float32 logits can tell, and its inverse is
#: finite.
MIN_TEMPERATURE = 1e-30

_SETTINGS = struct.Struct("<iififffffIIIii")  # the slot, then `state.Column`
_ROW_BYTES = 4 * (1 + NUM_COLUMNS)
assert _SETTINGS.size == _ROW_BYTES

# A row of lists: where each part begins.
_BIAS_IDS = 0
_BIAS_VALUES = _BIAS_IDS + MAX_LOGIT_BIAS
_BAD_WORDS = _BIAS_VALUES + MAX_LOGIT_BIAS
_END_IDS = _BAD_WORDS + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS
_ALLOWED = _END_IDS + MAX_END_TOKEN_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSettings:
    """A sequence taking `slot`; the fields of `device.step.SlotWrite` that sampling needs."""

    slot: int
    sampling: SamplingParams
    prompt_len: int
    choice: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotArrays:
    """Writes of one call, padded to W with writes of a slot that does not exist.

    Attributes:
        settings: the slot, then the columns of `state.Column`.
        lists: of the same writes, bias ids, bias values (their bits), bad words, end ids and
            allowed mask, one behind the other; None where no write of the call has any.
    """

    settings: Int[np.ndarray | Array, "W 1+C"]
    lists: Int[np.ndarray | Array, "W X"] | None


def write_sizes(max_rows: int) -> tuple[int, ...]:
    """The padded sizes W that `pack_writes` chooses from."""
    return (min(SMALL_WRITES, max_rows),) if max_rows <= SMALL_WRITES else (SMALL_WRITES, max_rows)


def padding_writes(*, vocab_size: int, max_rows: int) -> list[SlotArrays]:
    """One input without effect for each shape that `pack_writes` may return."""
    return [
        SlotArrays(
            settings=_padded_settings(size, max_rows),
            lists=_padded_lists(size, vocab_size) if with_lists else None,
        )
        for size in write_sizes(max_rows)
        for with_lists in (False, True)
    ]


def pack_writes(
    writes: Sequence[SlotSettings],
    *,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    max_rows: int,
) -> SlotArrays:
    """The arrays that `apply_writes` wants.

    Args:
        writes: at most max_rows, of different slots.
        eos_token_ids: the model's, at most MAX_EOS_TOKEN_IDS; `min_tokens` rules them out.
    """
    size = next(size for size in write_sizes(max_rows) if size >= len(writes))
    settings = _padded_settings(size, max_rows)
    lists = None
    buffer = settings.data.cast("B")
    for row, write in enumerate(writes):
        flags = _flags(write.sampling, vocab_size)
        _pack_settings(buffer, row, write, flags)
        if flags & Flag.LISTS.value:
            if lists is None:
                lists = _padded_lists(size, vocab_size)
            _pack_lists(lists[row], write.sampling, flags, eos_token_ids)
    return SlotArrays(settings=settings, lists=lists)


def apply_writes(state: SamplingState, arrays: SlotArrays) -> SamplingState:
    """Resets the written slots' history and stores their parameters."""
    slots, settings = arrays.settings[:, 0], arrays.settings[:, 1:]
    changes = {
        "settings": state.settings.at[slots].set(settings, mode="drop"),
        "recent": state.recent.at[slots].set(-1, mode="drop"),
    }
    counted = (settings[:, 0] & int(Flag.PENALTIES)) != 0
    num_slots = state.settings.shape[0]
    changes["counts"] = state.counts.at[jnp.where(counted, slots, num_slots)].set(0, mode="drop")
    if arrays.lists is not None:
        lists = arrays.lists
        bad_words = lists[:, _BAD_WORDS:_END_IDS].reshape(-1, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
        parts = {
            "bias_ids": lists[:, _BIAS_IDS:_BIAS_VALUES],
            "bias_values": jax.lax.bitcast_convert_type(
                lists[:, _BIAS_VALUES:_BAD_WORDS], jnp.float32
            ),
            "bad_words": bad_words,
            "end_ids": lists[:, _END_IDS:_ALLOWED],
            "allowed": jax.lax.bitcast_convert_type(lists[:, _ALLOWED:], jnp.uint32),
        }
        for name, part in parts.items():
            changes[name] = getattr(state, name).at[slots].set(part, mode="drop")
    return SamplingState(**(vars(state) | changes))


def _flags(sampling: SamplingParams, vocab_size: int) -> int:
    flags = 0
    if sampling.temperature > 0:
        flags = Flag.SAMPLES.value
        if 0 < sampling.top_k < vocab_size:
            flags |= Flag.TOP_K.value
        if sampling.top_p < 1:
            flags |= Flag.TOP_P.value
        if sampling.min_p > 0:
            flags |= Flag.MIN_P.value
    if (
        sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or sampling.repetition_penalty != 1
    ):
        flags |= Flag.PENALTIES.value
    if sampling.logit_bias:
        flags |= Flag.BIAS.value
    if sampling.bad_words:
        flags |= Flag.BAD_WORDS.value
    if sampling.min_tokens > 0:
        flags |= Flag.MIN_TOKENS.value
    if sampling.allowed_token_ids is not None:
        flags |= Flag.ALLOWED.value
    return flags


def _pack_settings(buffer: memoryview, row: int, write: SlotSettings, flags: int) -> None:
    sampling = write.sampling
    seed = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
    _SETTINGS.pack_into(
        buffer,
        row * _ROW_BYTES,
        write.slot,
        flags,
        max(sampling.temperature, MIN_TEMPERATURE),
        min(sampling.top_k, 0x7FFF_FFFF),
        sampling.top_p,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        seed & 0xFFFF_FFFF,
        seed >> 32,
        write.choice,
        write.prompt_len,
        write.prompt_len + sampling.min_tokens,
    )


def _pack_lists(
    row: Int[np.ndarray, "X"], sampling: SamplingParams, flags: int, eos_token_ids: Sequence[int]
) -> None:
    if flags & Flag.BIAS:
        ids, values = zip(*sampling.logit_bias, strict=True)
        row[_BIAS_IDS : _BIAS_IDS + len(ids)] = ids
        row[_BIAS_VALUES : _BIAS_VALUES + len(ids)] = np.asarray(values, np.float32).view(np.int32)
    for index, word in enumerate(sampling.bad_words):
        end = _BAD_WORDS + (index + 1) * MAX_BAD_WORD_TOKENS
        row[end - len(word) : end] = word
    if flags & Flag.MIN_TOKENS:
        end_ids = (*eos_token_ids, *sampling.stop_token_ids)
        row[_END_IDS : _END_IDS + len(end_ids)] = end_ids
    if flags & Flag.ALLOWED:
        ids = np.asarray(sampling.allowed_token_ids, np.int64)
        mask = row[_ALLOWED:].view(np.uint32)
        np.bitwise_or.at(mask, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))


def _padded_settings(size: int, max_rows: int) -> Int[np.ndarray, "W 1+C"]:
    settings = np.zeros((size, 1 + NUM_COLUMNS), np.int32)
    settings[:, 0] = max_rows + 1  # one past scratch: dropped
    return settings


def _padded_lists(size: int, vocab_size: int) -> Int[np.ndarray, "W X"]:
    lists = np.zeros((size, _ALLOWED + num_mask_words(vocab_size)), np.int32)
    lists[:, _BIAS_IDS:_BIAS_VALUES] = vocab_size
    lists[:, _BAD_WORDS:_END_IDS] = -1
    lists[:, _END_IDS:_ALLOWED] = vocab_size
    return lists
