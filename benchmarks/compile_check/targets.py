"""Compilers for chips that this machine does not have, and their devices.

libtpu compiles for any TPU on a CPU host; XLA's CUDA plugin does for a GPU, given a description of
one, of which the plugin carries several. `scripts/compilers` installs both into a folder of their
own: in the virtual environment JAX would try to use them as devices. To be imported before JAX.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.config import ParallelConfig
from jaxserve.device.chips import Slice

FOLDER = Path(__file__).parents[2] / ".cache" / "compilers"
_PLUGIN = FOLDER / "jax_plugins" / "xla_cuda13" / "xla_cuda_plugin.so"
#: The plugin's names for what it describes.
_GPUS = {"h100": b"NVIDIA H100 80GB HBM3", "h200": b"NVIDIA H200"}


def missing(platform: str) -> str | None:
    """What this machine lacks to compile for a platform; None where it lacks nothing."""
    path = FOLDER / "libtpu" if platform == "tpu" else _PLUGIN
    if path.exists():
        return None
    name = "libtpu" if platform == "tpu" else "JAX's CUDA plugin"
    return f"needs {name}: run scripts/compilers"


def prepare() -> None:
    """Sets the environment that the compilers want; before JAX is imported."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    )
    os.environ["PATH"] += os.pathsep + str(FOLDER / "nvidia" / "cu13" / "bin")  # ptxas
    sys.path.append(str(FOLDER))


def devices(slice: Slice) -> list[Any]:
    """The slice's devices, good for compiling only."""
    from jax.experimental import topologies

    if slice.chip.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=slice.name).devices
    shape = "x".join(map(str, (1,) * (3 - len(slice.shape)) + slice.shape))
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=shape,
        target_config=_description(_GPUS[slice.chip.name]),
    ).devices


def mesh(slice: Slice, config: ParallelConfig) -> Any:
    """The mesh that the engine would make of them."""
    from jaxserve.device.sharding import make_mesh

    return make_mesh(np.asarray(devices(slice), dtype=object).tolist(), config)


def platforms(slice: Slice) -> tuple[str, ...]:
    """What JAX has to lower for."""
    return ("tpu",) if slice.chip.platform == "tpu" else ("cuda",)


def _description(name: bytes) -> str:
    """The text proto of a GPU, as the plugin carries it."""
    data = _PLUGIN.read_bytes()
    found = re.search(rb'device_description_str: "' + re.escape(name) + rb'"', data)
    if found is None:
        raise LookupError(f"{_PLUGIN} describes no {name.decode()}")
    first, last = data.rfind(b"\0", 0, found.start()) + 1, data.find(b"\0", found.end())
    return data[first:last].decode()


def one_each(slice: Slice) -> ParallelConfig:
    """A configuration for any number of devices: as many copies of a model."""
    return ParallelConfig(data=slice.num_devices)
