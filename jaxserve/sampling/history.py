"""Tokens entering the model: counted for the penalties, the last ones kept for bad words.

Called once a step, before sampling, with the step's tokens; also with the tokens of a shared
prefix, which a slot never sees entering the model. After a preemption the slot is reset and sees
its tokens again. Costs next to nothing unless some row of the step looks back.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxserve.sampling.state import MAX_COUNT, PROMPT_BIT, Column, Flag, SamplingState


def observe(
    state: SamplingState,
    token_ids: Int[Array, "T"],
    rows_of_tokens: Int[Array, "T"],
    positions: Int[Array, "T"],
    live: Bool[Array, "T"],
) -> SamplingState:
    """Takes note of tokens that enter the model.

    Args:
        rows_of_tokens: slot of each token; a slot's tokens are neighbours, in order.
        positions: of each token in its sequence.
        live: false for padding.
    """
    settings = state.settings[rows_of_tokens]
    flags = jnp.where(live, settings[:, Column.FLAGS], 0)
    is_prompt = positions < settings[:, Column.PROMPT_LEN]
    counted = (flags & int(Flag.PENALTIES)) != 0
    remembered = (flags & int(Flag.BAD_WORDS)) != 0

    def take_note(counts: Array, recent: Array) -> tuple[Array, Array]:
        counts = jax.lax.cond(
            jnp.any(counted), _count, lambda counts, *_: counts,
            counts, rows_of_tokens, token_ids, is_prompt, counted,
        )  # fmt: skip
        recent = jax.lax.cond(
            jnp.any(remembered), _remember, lambda recent, *_: recent,
            recent, rows_of_tokens, token_ids, positions, remembered,
        )  # fmt: skip
        return counts, recent

    # One condition for all steps in which nobody looks back: on a GPU each is a wait of its own.
    counts, recent = jax.lax.cond(
        jnp.any(counted | remembered), take_note, lambda *kept: kept, state.counts, state.recent
    )
    return replace(state, counts=counts, recent=recent)


def _count(counts, slots, token_ids, is_prompt, counted):
    num_slots = counts.shape[0]
    nowhere = num_slots  # dropped
    prompt_slots = jnp.where(counted & is_prompt, slots, nowhere)
    seen = counts[slots, token_ids] | PROMPT_BIT
    counts = counts.at[prompt_slots, token_ids].set(seen.astype(jnp.uint16), mode="drop")
    output_slots = jnp.where(counted & ~is_prompt, slots, nowhere)
    counts = counts.at[output_slots, token_ids].add(jnp.uint16(1), mode="drop")
    total = counts[slots, token_ids]
    capped = (total & PROMPT_BIT) | jnp.minimum(total & (PROMPT_BIT - 1), MAX_COUNT)
    return counts.at[output_slots, token_ids].set(capped.astype(jnp.uint16), mode="drop")


def _remember(recent, slots, token_ids, positions, remembered):
    size = recent.shape[1]
    # Of a row's tokens in this step only the last `size` are written: each place once.
    later = jnp.concatenate([slots[size:], jnp.full((min(size, slots.shape[0]),), -1, slots.dtype)])
    later_live = jnp.concatenate([remembered[size:], jnp.zeros((min(size, slots.shape[0]),), bool)])
    overwritten = (later == slots) & later_live
    target = jnp.where(remembered & ~overwritten, slots, recent.shape[0])
    return recent.at[target, positions % size].set(token_ids, mode="drop")
