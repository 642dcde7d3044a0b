"""Sampling on several devices: each takes some of the rows, with their whole vocabulary.

The output head leaves each device with its part of the vocabulary for all rows. One all-to-all
turns that into all of the vocabulary for a part of the rows: no device ever holds the whole, and a
row's token is computed by the same code, bit for bit, as on one device. Greedy steps do not even
do that: two reductions of one number a row (`greedy`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a step's logits lie on the mesh of the context.

    Attributes:
        axes: mesh axes over which the vocabulary is split; none on one device.
        copies: mesh axes along which other rows are sampled by the same program. All places along
            them take the same branches, since those hold collectives.
    """

    axes: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    def anywhere(self, flag: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether the flag is set in any copy."""
        if not self.copies:
            return flag
        return jax.lax.pmax(flag.astype(jnp.int32), self.copies) != 0

    def over_rows(
        self, function: Callable[..., Any], rows: tuple[Array, ...], shared: Any = ()
    ) -> Any:
        """`function(*rows, shared)`, each device doing some of the rows.

        Args:
            rows: arrays whose first axis is the step's rows; the first ones are the logits.
            shared: a pytree that each device has whole.
        """
        if not self.axes:
            return function(*rows, shared)
        num_rows = rows[0].shape[0]
        mesh = jax.sharding.get_abstract_mesh()
        padding = -num_rows % prod(mesh.shape[axis] for axis in self.axes)
        rows = tuple(jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))) for x in rows)
        by_row, whole = PartitionSpec(self.axes), PartitionSpec()
        # What is whole stays so up to here: else the partitioner deals out all that leads to it.
        rows = (rows[0], *(jax.lax.with_sharding_constraint(x, whole) for x in rows[1:]))
        results = jax.shard_map(
            function,
            in_specs=(*(by_row,) * len(rows), whole),
            out_specs=by_row,
            axis_names=set(self.axes),
            check_vma=False,
        )(*rows, shared)
        results = jax.lax.with_sharding_constraint(results, whole)
        return jax.tree.map(lambda x: x[:num_rows], results)


ONE_DEVICE = Spread()


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Token with the largest logit, the lowest id among equals, by reductions along V alone."""
    best = jnp.max(logits, axis=1, keepdims=True)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)
    first = jnp.min(jnp.where(logits == best, ids, logits.shape[1]), axis=1)
    return jnp.where(first < logits.shape[1], first, 0)
