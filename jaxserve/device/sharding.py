"""Where arrays live: the mesh, and the one table from logical axes to its axes.

Models name the axes of their parameters (`Param.axes`); nothing else knows the mesh. Today's
engine runs on one device, where all of this comes to "there"; shardings are `NamedSharding`
throughout so that more devices change the mesh and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.types import CacheGroup

#: Sequences are spread over "data", matrices over "model".
MESH_AXES = ("data", "model")

#: Logical axis of a parameter or of the cache → mesh axis. An unknown name is an error.
RULES: dict[str, str | None] = {
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "embed": None,
    "layers": None,
}


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh over these devices, all of them along "model"."""
    grid = np.asarray(devices, dtype=object).reshape(1, len(devices))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition(axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
        KeyError: an axis that RULES does not name.
    """
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def param_sharding(mesh: Mesh) -> Callable[[tuple[str | None, ...]], NamedSharding]:
    """The function from a parameter's logical axes to its sharding."""
    return lambda axes: NamedSharding(mesh, partition(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def pages_sharding(mesh: Mesh, group: CacheGroup) -> NamedSharding:
    """Of pages [L, P, K, Z, W]: by KV head where the heads can be dealt out evenly."""
    evenly = group.num_kv_heads % mesh.shape["model"] == 0
    return NamedSharding(mesh, partition((None, None, "kv_heads" if evenly else None, None, None)))
