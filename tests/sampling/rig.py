"""Runs rows through the device's sampler as the step program does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampling import adjust, history, slots, state
from jaxserve.sampling.sample import sample
from tests.sampling.reference import Row

apply_writes = jax.jit(slots.apply_writes, donate_argnums=0)
observe = jax.jit(history.observe, donate_argnums=0)
sample_rows = jax.jit(sample)


@jax.jit
def adjust_rows(logits, held, slots_of_rows, positions, live):
    settings = state.read_settings(held, slots_of_rows, live)
    logits = jnp.maximum(logits, jnp.finfo(jnp.float32).min)  # as `sample` does
    return adjust.adjust_logits(logits, held, slots_of_rows, positions, settings)


class Rig:
    """Sampler state, and the sequences written to it."""

    def __init__(self, *, max_rows: int, vocab_size: int) -> None:
        self.max_rows, self.vocab_size = max_rows, vocab_size
        self.state = state.init_state(max_rows, vocab_size)

    def join(self, placed: dict[int, Row], *, feed: bool = True) -> None:
        """Writes rows to slots; all are of one model. Feeds their tokens unless told not to."""
        writes = [
            slots.SlotSettings(
                slot=slot, sampling=row.sampling, prompt_len=len(row.prompt), choice=row.choice
            )
            for slot, row in placed.items()
        ]
        eos_token_ids = next(iter(placed.values())).eos_token_ids
        arrays = slots.pack_writes(
            writes,
            eos_token_ids=eos_token_ids,
            vocab_size=self.vocab_size,
            max_rows=self.max_rows,
        )
        self.state = apply_writes(self.state, arrays)
        if feed:
            self.feed({slot: [*row.prompt, *row.output] for slot, row in placed.items()})

    def feed(self, tokens: dict[int, Sequence[int]], start: int = 0, padding: int = 0) -> None:
        """One step in which these tokens enter the model, each slot's from `start` on."""
        ids = np.concatenate([list(t) for t in tokens.values()] + [[0] * padding])
        of_slot = np.concatenate(
            [[slot] * len(t) for slot, t in tokens.items()] + [[self.max_rows] * padding]
        )
        places = np.concatenate(
            [np.arange(start, start + len(t)) for t in tokens.values()] + [[0] * padding]
        )
        live = np.arange(ids.size) < ids.size - padding
        # few shapes: else each example would compile its own program
        width = 1 << max(ids.size - 1, 15).bit_length()
        pad = partial(np.pad, pad_width=(0, width - ids.size))
        self.state = observe(
            self.state,
            pad(ids).astype(np.int32),
            pad(of_slot, constant_values=self.max_rows).astype(np.int32),
            pad(places).astype(np.int32),
            pad(live),
        )

    def step(self, placed: dict[int, Row], *, size: int | None = None, call=sample_rows, later=0):
        """The call's result for each placed row, in a batch padded to `size` rows.

        Args:
            later: positions that the sampled tokens stand behind the known tokens.
        """
        size = size or len(placed)
        logits = np.zeros((size, self.vocab_size), np.float32)
        of_row = np.full(size, self.max_rows, np.int32)
        places = np.zeros(size, np.int32)
        for index, (slot, row) in enumerate(placed.items()):
            logits[index] = row.logits
            of_row[index] = slot
            places[index] = len(row.prompt) + len(row.output) + later
        live = np.arange(size) < len(placed)
        result = call(jnp.asarray(logits), self.state, of_row, places, live)
        return np.asarray(result)[: len(placed)]
