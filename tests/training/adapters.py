"""The adapters under tests/data/adapters, as weights that are merged into the served model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxserve.formats.peft import Adapter, read_adapter
from jaxserve.weights.checkpoint import Checkpoint

ADAPTERS = Path(__file__).parent.parent / "data" / "adapters"


def trained(name: str) -> Adapter:
    """One that scripts/train_adapters made."""
    return read_adapter(ADAPTERS / name, max_rank=8)


class Merged:
    """A checkpoint with an adapter's deltas added to its weights."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter
        self.config = base.config
        self.names = base.names
        self.shape = base.shape

    def read(self, name: str) -> np.ndarray:
        """See `Checkpoint`."""
        tensor = self._base.read(name)
        module = self._adapter.modules.get(name.removesuffix(".weight"))
        return tensor if module is None else tensor.astype(np.float32) + module.delta()
