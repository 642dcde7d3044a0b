"""What lives on the device between steps, as one frozen registered pytree.

Passed to every program, donated, returned: there is exactly one, and the executor holds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.device.sharding import by_data
from jaxserve.device.step import Program
from jaxserve.models.context import KVCache
from jaxserve.sampling.state import SamplingState, init_state
from jaxserve.weights.place import place


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """State of S = max_rows slots and the scratch slot S, where padding rows point.

    Where there are several copies of the model, theirs stand one behind the other along the axis
    of slots, or of pages; each copy sees its own (`state_specs`).

    Attributes:
        cache: the pages.
        sampling: settings and history by slot.
        page_tables: by cache group, the page of each run of page_size positions of a slot; 0, the
            null page, where there is none. Entries of a slot's earlier owner may be left over:
            they lie past the new owner's context and are not read.
        last_tokens: the token sampled last in each slot: the next decode step's input.
        hidden: what the model made of the places that the last masked step samples after; read by
            the program that does so, which comes next.
    """

    cache: KVCache
    sampling: SamplingState
    page_tables: tuple[Int[Array, "S+1 M"], ...]
    last_tokens: Int[Array, "S+1"]
    hidden: Float[Array, "N D"]


def state_specs() -> DeviceState:
    """The axis of each array that is dealt out over the copies of the model."""
    slots: Any = PartitionSpec("data")
    pages: Any = PartitionSpec(None, "data")
    return DeviceState(
        cache=pages, sampling=slots, page_tables=slots, last_tokens=slots, hidden=slots
    )


def init_device_state(
    cache: KVCache,
    *,
    max_rows: int,
    vocab_size: int,
    pages_per_sequence: int,
    hidden: jax.ShapeDtypeStruct,
    mesh: Mesh,
) -> DeviceState:
    """The state of an engine that has not run yet.

    Args:
        cache: fresh pools.
        max_rows: slots of each copy of the model.
        pages_per_sequence: M, columns of a page table.
        hidden: [N, D] of each copy of the model: the most places that a step samples after.
    """
    fresh = fresh_state(
        len(cache.groups),
        num_slots=mesh.shape["data"] * (max_rows + 1),
        vocab_size=vocab_size,
        pages_per_sequence=pages_per_sequence,
        hidden=(mesh.shape["data"] * hidden.shape[0], *hidden.shape[1:]),
        dtype=hidden.dtype,
    )
    placed = jax.tree.map(lambda x: place(x, by_data(mesh)), fresh)
    return replace(placed, cache=cache)


def hidden_states(
    programs: Iterable[Program], hidden_size: int, dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """Room for the most places after which any of these programs samples."""
    num_places = max(program.num_places for program in programs)
    return jax.ShapeDtypeStruct((num_places, hidden_size), dtype)


def fresh_state(
    num_groups: int,
    *,
    num_slots: int,
    vocab_size: int,
    pages_per_sequence: int,
    hidden: tuple[int, ...],
    dtype: DTypeLike,
) -> DeviceState:
    """That state on this host, without a cache.

    Args:
        num_slots: of all copies of the model, scratch slots included; hidden: likewise.
    """
    table = (num_slots, pages_per_sequence)
    return DeviceState(
        cache=KVCache(groups=()),
        sampling=init_state(num_slots - 1, vocab_size),
        page_tables=tuple(jnp.zeros(table, jnp.int32) for _ in range(num_groups)),
        last_tokens=jnp.zeros(num_slots, jnp.int32),
        hidden=jnp.zeros(hidden, dtype),
    )
