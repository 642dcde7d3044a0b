"""Puts an array from the host where its sharding says, also where that spans several hosts."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout


def place(
    array: Any, sharding: jax.sharding.Sharding | None, layout: Layout | None = None
) -> jax.Array:
    """The array on its devices.

    Every host of a mesh calls this with the same values; each puts its own shards, and nothing
    is exchanged (`jax.device_put` would have all hosts compare the whole array first).

    Args:
        array: whole, of this host.
        sharding: the default device where None.
        layout: JAX's own where None; of no effect without a sharding.
    """
    if sharding is None:
        return jax.device_put(array)
    where = sharding if layout is None else Format(layout, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(array, where)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])
