"""Checkpoints of a run: all that it needs to go on as if it had never stopped.

Orbax's CheckpointManager writes each under a temporary name and renames it when it is whole, so
that a run which is killed at any point, this one included, finds its last whole checkpoint. Beside
the arrays stands what the run was begun with, and its losses so far.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from jaxserve.errors import WeightsError
from jaxserve.training.step import TrainState
from jaxserve.weights.orbax_checkpoint import import_orbax

_KEPT = 2


class Checkpoints:
    """The checkpoints in a directory, which is made if need be; a context manager.

    Raises:
        WeightsError: Orbax is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self._ocp = import_orbax()
        self._directory = directory
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = self._ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the last whole one; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Writes one, unless that step has one already.

        Args:
            progress: anything that JSON holds.

        Raises:
            WeightsError: it cannot be written.
        """
        step, args = int(state.step), self._ocp.args
        if step in self._manager.all_steps():
            return
        items = args.Composite(
            state=args.StandardSave(state), progress=args.JsonSave(dict(progress))
        )
        try:
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore have no common base
            free = shutil.disk_usage(self._directory).free
            raise WeightsError(
                f"cannot write the checkpoint of step {step} in {self._directory}: "
                f"{_words(error)} ({free} bytes are free there)"
            ) from error

    def progress(self) -> dict[str, Any]:
        """What stands beside the last one's arrays.

        Raises:
            WeightsError: it cannot be read.
        """
        return self._restore(progress=self._ocp.args.JsonRestore())["progress"]

    def state(self, like: TrainState) -> TrainState:
        """The last one's arrays.

        Args:
            like: a state of the same shapes, on the devices where they go.

        Raises:
            WeightsError: it cannot be read.
        """
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        return self._restore(state=self._ocp.args.StandardRestore(shapes))["state"]

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()

    def _restore(self, **items: Any) -> Mapping[str, Any]:
        step = self.latest()
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore have no common base
            raise WeightsError(
                f"the checkpoint of step {step} in {self._directory} cannot be read: "
                f"{_words(error)}; remove that step's folder to go on from the one before"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _words(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
