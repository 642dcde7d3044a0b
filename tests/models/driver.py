"""Drives a model over the paged cache without the engine: what the engine's steps come down to.

`Driver` owns the cache and the page tables of some sequences; each `step` brings some of them
forward by some tokens, in one padded batch, as a mixed step of decode rows and prefill chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.context import GroupPages, KVCache, StepContext
from jaxserve.models.decoder import Decoder
from jaxserve.models.deltas import SlotClass, StepDeltas
from pallas_kernels.ragged import RaggedBatch

PAGE_SIZE = 8


@partial(jax.jit, donate_argnames="cache")
def _forward(
    model: Decoder,
    cache: KVCache,
    token_ids: Any,
    batches: tuple[RaggedBatch, ...],
    last: Any,
    adapters: tuple[Any, Any] | None = None,
) -> tuple[Any, Any, KVCache]:
    num_tokens = token_ids.shape[0]
    context = StepContext.build(batches, num_tokens, PAGE_SIZE)
    deltas = slots = None
    if adapters is not None:
        classes, slots = adapters
        of_token = slots[batches[0].token_rows(num_tokens)]
        live = batches[0].live_tokens(num_tokens)
        deltas = StepDeltas.of(classes, jnp.where(live, of_token, -1))
    hidden, cache = model(token_ids, cache, replace(context, deltas=deltas))
    live_rows = jnp.sum(batches[0].query_lens > 0)
    return hidden, model.logits(hidden[last], live_rows, deltas, slots), cache


_all_logits = jax.jit(lambda model, hidden: model.logits(hidden))


class Driver:
    """Sequences 0 … num_sequences - 1 of one model; pages are dealt out in a shuffled order.

    Args:
        adapters: classes of slots, and the slot of each sequence's adapter, -1 for none.
    """

    def __init__(
        self,
        model: Decoder,
        num_sequences: int,
        max_tokens: int,
        dtype: str = "float32",
        adapters: tuple[Sequence[SlotClass], Sequence[int]] | None = None,
    ) -> None:
        self.adapters = adapters
        self.model = model
        self.lens = [0] * num_sequences
        max_pages = -(-max_tokens // PAGE_SIZE)
        num_pages = num_sequences * max_pages + 1
        rng = np.random.default_rng(0)
        self.tables = []
        groups = []
        for group in model.cache_groups():
            pages = rng.permutation(np.arange(1, num_pages, dtype=np.int32))
            self.tables.append(pages.reshape(num_sequences, max_pages))
            width = 2 * group.head_dim
            shape = (len(group.layers), num_pages, group.num_kv_heads, PAGE_SIZE, width)
            # what was never written must not matter
            groups.append(GroupPages(kv=jnp.full(shape, jnp.nan, dtype)))
        self.cache = KVCache(groups=tuple(groups))

    def step(
        self,
        tokens: dict[int, Sequence[int]],
        *,
        num_rows: int | None = None,
        num_tokens: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Brings these sequences forward.

        Returns:
            The logits after each row's last token, in the order of `tokens`, and the hidden
            states of all tokens.
        """
        num_live = sum(map(len, tokens.values()))
        arguments = self._arguments(tokens, num_rows or len(tokens), num_tokens or num_live)
        hidden, logits, self.cache = _forward(self.model, self.cache, *arguments)
        return np.asarray(logits)[: len(tokens)], np.asarray(hidden)[:num_live]

    def compiled(self, num_tokens: int) -> jax.stages.Compiled:
        """The program of a step with one sequence."""
        arguments = self._arguments({0: [0]}, 1, num_tokens)
        return _forward.lower(self.model, self.cache, *arguments).compile()

    def _arguments(
        self, tokens: dict[int, Sequence[int]], num_rows: int, num_tokens: int
    ) -> tuple[Any, ...]:
        """Token ids, the batch of each cache group, and each row's last token."""
        rows, lens = list(tokens), [len(part) for part in tokens.values()]
        flat = np.zeros(num_tokens, np.int32)
        flat[: sum(lens)] = np.concatenate([np.asarray(part, np.int32) for part in tokens.values()])
        starts = np.full(num_rows + 1, sum(lens), np.int32)
        starts[: len(lens) + 1] = np.cumsum([0, *lens])
        context_lens = np.zeros(num_rows, np.int32)
        for i, row in enumerate(rows):
            self.lens[row] += lens[i]
            context_lens[i] = self.lens[row]
        batches = []
        for table in self.tables:
            padded = np.zeros((num_rows, table.shape[1]), np.int32)
            padded[: len(rows)] = table[rows]
            batches.append(
                RaggedBatch(
                    page_table=jnp.asarray(padded),
                    query_starts=jnp.asarray(starts),
                    context_lens=jnp.asarray(context_lens),
                    max_query_len=1 if num_rows == num_tokens else num_tokens,
                    aligned=num_rows == num_tokens,
                )
            )
        last = jnp.asarray(np.maximum(starts[1:] - 1, 0))
        if self.adapters is None:
            return jnp.asarray(flat), tuple(batches), last
        slots = np.full(num_rows, -1, np.int32)
        slots[: len(rows)] = [self.adapters[1][row] for row in rows]
        adapters = tuple(self.adapters[0]), jnp.asarray(slots)
        return jnp.asarray(flat), tuple(batches), last, adapters

    def all_logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits of every given hidden state."""
        return np.asarray(_all_logits(self.model, jnp.asarray(hidden)))
