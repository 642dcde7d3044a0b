"""Where arrays live: the mesh, and the one table from logical axes to its axes.

The mesh is data × expert × model. Each place along "data" is a copy of the model with sequences,
slots and pages of its own; a step is mapped over it by hand (`per_data_shard`), so that page ids
are local to a copy and nothing is exchanged between copies. Within a copy, matrices, heads and the
vocabulary are split over "expert" and "model" together, and experts over "expert": XLA's
partitioner places the collectives, from the shardings of the arguments alone.

Models name the axes of their parameters (`Param.axes`); nothing else knows the mesh. A parameter
whose axis the devices do not divide is whole on each of them, which `undivided` lists. Attention
heads are never in that list: they were dealt out by `AttentionSpec.spread`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ParallelConfig
from jaxserve.errors import ConfigError
from jaxserve.models.parallel import RULES, TENSOR_AXES

MESH_AXES = ("data", "expert", "model")

ONE_COPY = ParallelConfig()


def make_mesh(
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
    config: ParallelConfig = ONE_COPY,
) -> Mesh:
    """The mesh over these devices.

    Raises:
        ConfigError: there are not as many devices as the configuration asks for.
    """
    grid = np.asarray(devices, dtype=object).reshape(mesh_shape(len(devices), config))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(num_devices: int, config: ParallelConfig) -> tuple[int, int, int]:
    """Sizes of the mesh's axes.

    Raises:
        ConfigError: their product is not the number of devices.
    """
    outer = config.data * config.expert
    model = config.model or max(1, num_devices // outer)
    if outer * model != num_devices:
        raise ConfigError(
            f"parallel.data={config.data} × parallel.expert={config.expert} × "
            f"parallel.model={model} is not the number of devices, {num_devices}"
        )
    return config.data, config.expert, model


def tensor_parallel(mesh: Mesh | AbstractMesh) -> int:
    """Devices that share each matrix."""
    return math.prod(mesh.shape[axis] for axis in TENSOR_AXES)


def partition(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec:
    """Mesh axes of an array with these logical axes; an axis that does not divide is not split.

    Raises:
        KeyError: an axis that RULES does not name.
    """
    wanted = [None if axis is None else RULES[axis] for axis in axes]
    return PartitionSpec(
        *(
            None if size % _num_parts(mesh, axis) else axis
            for axis, size in zip(wanted, shape, strict=True)
        )
    )


def num_shares(mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> int:
    """Parts that an array is cut into."""
    return math.prod(_num_parts(mesh, axes) for axes in spec)


def _num_parts(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


#: From a parameter's logical axes and shape to where it goes.
ParamSharding = Callable[[tuple[str | None, ...], tuple[int, ...]], NamedSharding]


def param_sharding(mesh: Mesh) -> ParamSharding:
    """Shardings of parameters on a mesh."""
    return lambda axes, shape: NamedSharding(mesh, partition(mesh, axes, shape))


def undivided(mesh: Mesh | AbstractMesh, params: Iterable[tuple[Any, Any]]) -> list[str]:
    """Names and shapes of parameters that are whole on each device against their rule.

    Args:
        params: (path, parameter), as `Decoder.params` has them.
    """
    found = []
    for path, param in params:
        axes = param.get_metadata("axes")
        spec = partition(mesh, axes, param.shape)
        ruled = (axis is not None and _num_parts(mesh, RULES[axis]) > 1 for axis in axes)
        if any(rule and part is None for rule, part in zip(ruled, spec, strict=True)):
            found.append(f"{'.'.join(map(str, path))} {tuple(param.shape)}")
    return found


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_data(mesh: Mesh) -> NamedSharding:
    """The first axis dealt out over the copies of the model."""
    return NamedSharding(mesh, PartitionSpec("data"))


def pages_sharding(mesh: Mesh) -> NamedSharding:
    """Of pages [L, P, K, …]: each copy of the model its own pages, each device its own KV heads."""
    return NamedSharding(mesh, PartitionSpec(None, "data", TENSOR_AXES))


def moved_sharding(mesh: Mesh) -> NamedSharding:
    """Of pages on their way to the host or from it, [copies, C, L, K, …]: as `pages_sharding`."""
    return NamedSharding(mesh, PartitionSpec("data", None, None, TENSOR_AXES))


def per_data_shard(
    mesh: Mesh, function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """A function of one copy of the model, run by each copy on its own part of the arguments.

    Args:
        in_specs, out_specs: as `jax.shard_map` takes them, naming "data" at most.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"data"},
        check_vma=False,
    )
