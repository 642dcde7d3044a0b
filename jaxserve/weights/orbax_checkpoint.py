"""An Orbax directory as a checkpoint: `orbax/` with a tree of arrays, and HF's config.json.

The tree is HF's tensor names split at their dots, so that a checkpoint holds what the model's HF
directory held, whatever mesh or format the model is loaded with later. Written by `convert`.
Tensors are read one at a time. Orbax is imported when a checkpoint is opened.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxserve.errors import WeightsError
from jaxserve.weights.checkpoint import read_config

#: Folder of the arrays inside the model's directory.
FOLDER = "orbax"


class OrbaxCheckpoint:
    """See the module, and `weights.checkpoint.Checkpoint`.

    Raises:
        WeightsError: it is not whole, or orbax-checkpoint is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self.config = read_config(directory)
        self._folder = (directory / FOLDER).absolute()
        self._ocp = import_orbax()
        self._lock = threading.Lock()  # Orbax runs an event loop of its own in each call
        self._checkpointer = self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler())
        try:
            tree = self._checkpointer.metadata(self._folder).item_metadata.tree
            self._shapes = {
                ".".join(path): tuple(int(axis) for axis in leaf.shape)
                for path, leaf in _leaves(tree, ())
            }
        except Exception as error:  # Orbax and TensorStore have no common base
            raise self._broken(error) from error

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._shapes[name]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """See `Checkpoint`."""
        path = name.split(".")
        arguments = self._ocp.args.PyTreeRestore(
            item=_nested(path, 0),
            restore_args=_nested(path, self._ocp.RestoreArgs(restore_type=np.ndarray)),
            partial_restore=True,
        )
        try:
            with self._lock:
                found = self._checkpointer.restore(self._folder, args=arguments)
        except Exception as error:
            raise self._broken(error, f"tensor {name!r}: ") from error
        for key in path:
            found = found[key]
        return found

    def _broken(self, error: Exception, what: str = "") -> WeightsError:
        text = " ".join(str(error).split())
        return WeightsError(
            f"{self._folder} is no whole Orbax checkpoint: {what}{text:.300}; convert it again"
        )


def import_orbax() -> Any:
    """orbax.checkpoint.

    Raises:
        WeightsError: it is not installed.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise WeightsError(
            f"Orbax checkpoints need orbax-checkpoint ({error}): pip install orbax-checkpoint"
        ) from error
    return ocp


def tree_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name as the tree in which they are saved.

    Raises:
        WeightsError: one name continues another, so that they cannot stand in one tree.
    """
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise WeightsError(f"the tensor names contradict each other at {name!r}")
        if last in node:
            raise WeightsError(f"the tensor names contradict each other at {name!r}")
        node[last] = tensor
    return tree


def _nested(path: list[str], leaf: Any) -> Any:
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _leaves(child, (*path, str(key)))
    else:
        yield path, tree
