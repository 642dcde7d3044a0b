"""Changes of device state before a step: slots, page tables, copies and moves of pages, adapters.

Each is a small program of its own, which takes so much a call; more is done in several calls. As
with the step, everything is a pure function of (state, host's arrays), and the buffers are donated.

Where the mesh holds several copies of the model, a change that one copy needs goes to the others as
padding, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxserve.device.adapters import AdapterSlots
from jaxserve.device.cache import copy_pages
from jaxserve.device.host_store import HostStore
from jaxserve.device.lowering import Wanted, shapes
from jaxserve.device.packing import ENTRY_FIELDS, NO_GROUP, fill_entries
from jaxserve.device.programs import write_entries
from jaxserve.device.state import DeviceState
from jaxserve.device.step import AdapterWrite, SlotWrite, StepInputs
from jaxserve.models.context import KVCache
from jaxserve.models.spec import ModelSpec
from jaxserve.sampling.history import observe
from jaxserve.sampling.slots import (
    SlotArrays,
    SlotSettings,
    apply_writes,
    pack_writes,
    padding_writes,
)

#: What one call of the small programs takes; more is done in several calls.
ENTRIES_A_CALL = 256
COPIES_A_CALL = 16
PREFIX_TOKENS_A_CALL = 128
#: What stands before the tokens of a prefix: slot, first position, how many.
PREFIX_SCALARS = 3


#: Starts the program of a key with its inputs, in line with all others.
Call = Callable[[Hashable, Any], Any]


class Changes:
    """Makes the changes that steps ask for.

    Args:
        spec: of the model.
        state: whose shapes the programs are for.
        mesh: that it is on.
        store: pages in the host's memory; None where there is none.
        adapters: slots of LoRA adapters; None where there are none.
        call: starts a program that changes the state.
        move_pages: the same for a program of the store, which also may read the state.
    """

    def __init__(
        self,
        spec: ModelSpec,
        state: DeviceState,
        mesh: Mesh,
        store: HostStore | None,
        adapters: AdapterSlots | None,
        *,
        call: Call,
        move_pages: Call,
    ) -> None:
        self._spec = spec
        self._mesh = mesh
        self._copies = mesh.shape["data"]
        self._num_groups = len(state.page_tables)
        self._max_rows = state.last_tokens.shape[0] // self._copies - 1
        self._store = store
        self._adapters = adapters
        self._call = call
        self._move_pages = move_pages
        self._no_writes = {_slots_key(writes): writes for writes in self._padding_writes()}

    def wanted(self) -> dict[Hashable, Wanted]:
        """Their programs, by the key each is called by."""
        wanted: dict[Hashable, Wanted] = {}
        for writes in self._padding_writes():
            wanted[_slots_key(writes)] = Wanted(write_slots, shapes(writes))
        wanted["entries"] = Wanted(write_page_tables, shapes(packed_entries(())))
        wanted["prefix"] = Wanted(write_prefix, shapes(packed_prefix(0, 0, ())))
        for group in range(self._num_groups):
            wanted["copy", group] = Wanted(make_copy(group), shapes(packed_copies(())))
        if self._store is not None:
            wanted |= self._store.wanted()
        if self._adapters is not None:
            for key, (write, content, slots) in self._adapters.programs().items():
                wanted[key] = Wanted(write, shapes(content), slots=slots)
        return wanted

    def run_empty(self) -> None:
        """Runs each once without effect, but those of the store, which warms up by itself."""
        for writes in self._padding_writes():
            self._change(_slots_key(writes), 0, writes, writes)
        self._write_entries(0, [(NO_GROUP, 0, 0, 0)])
        self._write_prefix(0, self._max_rows, [0])
        for group in range(self._num_groups):
            self._copy_pages(0, [(group, 0, 0)])
        if self._adapters is not None:
            for key, (_, content, _) in self._adapters.programs().items():
                self._change(key, 0, content, content)

    def make(
        self, copy: int, own: StepInputs, overflow: Sequence[tuple[int, int, int, int]]
    ) -> None:
        """Makes those that a step needs before it.

        Args:
            copy: of the model, whose inputs these are.
            overflow: page-table deltas that do not fit into the step's own array.
        """
        for write in own.adapter_writes:
            self._write_adapter(copy, write)
        if own.page_saves and self._store is not None:
            self._store.save(copy, own.page_saves, self._move_pages)
        if own.slot_writes:
            self._write_slots(copy, own.slot_writes)
        if own.page_copies:
            self._copy_pages(copy, own.page_copies)
        self._write_entries(copy, overflow)
        if own.page_loads and self._store is not None:
            self._store.load(copy, own.page_loads, self._move_pages)

    def _change(self, key: Hashable, copy: int, inputs: Any, padding: Any) -> None:
        """Runs a change of state: `inputs` for one copy of the model, `padding` for the others."""
        if self._mesh.size > 1:
            everywhere = [inputs if place == copy else padding for place in range(self._copies)]
            inputs = jax.tree.map(lambda *parts: np.stack(parts), *everywhere)
        self._call(key, inputs)

    def _write_slots(self, copy: int, writes: Sequence[SlotWrite]) -> None:
        spec = self._spec
        arrays = pack_writes(
            [
                SlotSettings(
                    slot=write.slot,
                    sampling=write.sampling,
                    prompt_len=write.prompt_len,
                    choice=write.choice,
                )
                for write in writes
            ],
            eos_token_ids=spec.eos_token_ids,
            vocab_size=spec.vocab_size,
            max_rows=self._max_rows,
        )
        key = _slots_key(arrays)
        self._change(key, copy, arrays, self._no_writes[key])
        for write in writes:
            if write.prefix:
                self._write_prefix(copy, write.slot, write.prefix)

    def _write_adapter(self, copy: int, write: AdapterWrite) -> None:
        assert self._adapters is not None
        for part, index, content in self._adapters.writes(write.slot, write.arrays):
            padding = content if self._copies == 1 else self._adapters.padding(part, index)
            self._change(("adapter", part, index), copy, content, padding)

    def _write_prefix(self, copy: int, slot: int, tokens: Sequence[int]) -> None:
        size = PREFIX_TOKENS_A_CALL
        for first in range(0, len(tokens), size):
            packed = packed_prefix(slot, first, tokens[first : first + size])
            self._change("prefix", copy, packed, packed_prefix(self._max_rows, 0, ()))

    def _write_entries(self, copy: int, entries: Sequence[tuple[int, int, int, int]]) -> None:
        size = ENTRIES_A_CALL
        for first in range(0, len(entries), size):
            packed = packed_entries(entries[first : first + size])
            self._change("entries", copy, packed, packed_entries(()))

    def _copy_pages(self, copy: int, copies: Sequence[tuple[int, int, int]]) -> None:
        size = COPIES_A_CALL
        for group in sorted({group for group, _, _ in copies}):
            pairs = [(source, target) for g, source, target in copies if g == group]
            for first in range(0, len(pairs), size):
                packed = packed_copies(pairs[first : first + size])
                self._change(("copy", group), copy, packed, packed_copies(()))

    def _padding_writes(self) -> list[SlotArrays]:
        return padding_writes(vocab_size=self._spec.vocab_size, max_rows=self._max_rows)


def _slots_key(writes: SlotArrays) -> tuple[str, int, bool]:
    return "slots", writes.settings.shape[0], writes.lists is not None


# ---------------------------------------------------------------------------- the programs


def write_slots(state: DeviceState, arrays: SlotArrays) -> DeviceState:
    """Resets slots and stores their parameters."""
    return replace(state, sampling=apply_writes(state.sampling, arrays))


def write_page_tables(state: DeviceState, entries: Int[Array, "E 4"]) -> DeviceState:
    """Page-table deltas that do not fit into the step's own array."""
    return replace(state, page_tables=write_entries(state.page_tables, entries))


def write_prefix(state: DeviceState, packed: Int[Array, "X"]) -> DeviceState:
    """Tokens of a shared prefix: a slot takes note of what it never sees entering the model."""
    slot, first, num_live = (packed[i] for i in range(PREFIX_SCALARS))
    token_ids = packed[PREFIX_SCALARS:]
    index = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    slots = jnp.full_like(token_ids, slot)
    sampling = observe(state.sampling, token_ids, slots, first + index, index < num_live)
    return replace(state, sampling=sampling)


def make_copy(group: int) -> Callable[[DeviceState, Array], DeviceState]:
    """The program that copies pages of one cache group, from the first column to the second."""

    def copy(state: DeviceState, pairs: Int[Array, "C 2"]) -> DeviceState:
        groups = list(state.cache.groups)
        groups[group] = copy_pages(groups[group], pairs[:, 0], pairs[:, 1])
        return replace(state, cache=KVCache(groups=tuple(groups)))

    return copy


# ---------------------------------------------------------------------------- the host's side


def packed_prefix(slot: int, first: int, tokens: Sequence[int]) -> Int[np.ndarray, "X"]:
    """See `write_prefix`."""
    scalars = PREFIX_SCALARS
    packed = np.zeros(scalars + PREFIX_TOKENS_A_CALL, np.int32)
    packed[:scalars] = slot, first, len(tokens)
    packed[scalars : scalars + len(tokens)] = tokens
    return packed


def packed_entries(entries: Sequence[tuple[int, int, int, int]]) -> Int[np.ndarray, "E 4"]:
    """See `write_page_tables`."""
    packed = np.empty((ENTRIES_A_CALL, ENTRY_FIELDS), np.int32)
    fill_entries(packed, entries)
    return packed


def packed_copies(pairs: Sequence[tuple[int, int]]) -> Int[np.ndarray, "C 2"]:
    """See `make_copy`."""
    packed = np.zeros((COPIES_A_CALL, 2), np.int32)
    if pairs:
        packed[: len(pairs)] = pairs
    return packed
