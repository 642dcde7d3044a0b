"""Puts the matrices of a mixture's experts on their devices, each device's part by itself.

They are nearly all of a large mixture, so they are never whole on the host: a device's part is
read, built, encoded and put there before the next one. On several hosts each reads only the experts
that its own devices hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxserve.models.linear import Path, encode_layer, matrix_paths
from jaxserve.models.spec import TensorRule

#: Where a parameter goes; None is the default device.
Place = Callable[[nnx.Param], jax.sharding.Sharding | None]
#: Of a part of an array, the first place and the one behind the last, along each axis.
Bounds = tuple[tuple[int, int], ...]


def put_experts(
    params: Mapping[Path, nnx.Param],
    path: Path,
    rule: TensorRule,
    read: Callable[[str], np.ndarray],
    place: Place,
) -> dict[Path, jax.Array]:
    """One matrix of every expert, and its scales where it is quantized, on their devices.

    Args:
        rule: of `path`, with a rule for each expert, of each layer where layers are stacked.
        read: gives a tensor of the checkpoint.

    Raises:
        ValueError: as `encode_layer`.
    """
    paths = matrix_paths(params, path)
    shapes = [params[p].shape for p in paths]
    shardings = [sharding for p in paths if (sharding := place(params[p])) is not None]
    if not shardings:
        whole = tuple(tuple((0, size) for size in shape) for shape in shapes)
        held = _build(params, path, rule, read, whole)
        return {p: jax.device_put(array) for p, array in zip(paths, held, strict=True)}
    # Devices that hold the same part get it from one build of it.
    devices_of: dict[tuple[Bounds, ...], list[Any]] = defaultdict(list)
    maps = [
        sharding.addressable_devices_indices_map(shape)
        for sharding, shape in zip(shardings, shapes, strict=True)
    ]
    for device in maps[0]:
        of_device = (_bounds(found[device], s) for found, s in zip(maps, shapes, strict=True))
        devices_of[tuple(of_device)].append(device)
    parts: list[list[jax.Array]] = [[] for _ in paths]
    for bounds, devices in devices_of.items():
        held = _build(params, path, rule, read, bounds)
        for device in devices:
            for own, array in zip(parts, held, strict=True):
                own.append(jax.device_put(array, device))
    return {
        p: jax.make_array_from_single_device_arrays(shape, sharding, own)
        for p, shape, sharding, own in zip(paths, shapes, shardings, parts, strict=True)
    }


def _bounds(region: Any, shape: tuple[int, ...]) -> Bounds:
    """Of what JAX says that a device holds, a slice of each axis."""
    return tuple(axis.indices(size)[:2] for axis, size in zip(region, shape, strict=True))


def _build(
    params: Mapping[Path, nnx.Param],
    path: Path,
    rule: TensorRule,
    read: Callable[[str], np.ndarray],
    bounds: tuple[Bounds, ...],
) -> list[np.ndarray]:
    """The part of the matrices, and of their scales, within these bounds."""
    paths = matrix_paths(params, path)
    leading = 2 if rule.layers else 1  # axes in front of an expert's matrix: layers, experts
    one_expert = [(1, *params[p].shape[leading:]) for p in paths]
    held = [
        np.empty([last - first for first, last in of_array], params[p].dtype)
        for of_array, p in zip(bounds, paths, strict=True)
    ]
    within = [
        (0, *(slice(first, last) for first, last in of_array[leading:])) for of_array in bounds
    ]
    for at in np.ndindex(held[0].shape[:leading]):
        *layer, expert = (first + i for (first, _), i in zip(bounds[0], at, strict=False))
        of_layer = rule.layers[layer[0]] if layer else rule
        of_expert = of_layer.experts[expert]
        dense = of_expert.build([read(name) for name in of_expert.names])
        encoded = encode_layer(params[path], path, dense[None], one_expert)
        for whole, part, wanted in zip(held, encoded, within, strict=True):
            whole[at] = part[wanted]
    return held
