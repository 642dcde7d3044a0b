"""Hopper kernels whose copies begin where TMA can: at multiples of 128 bytes of shared memory.

The interpreter copies anything; a GPU stops with a misaligned address.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import TMA_ALIGNMENT


def aligned_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets only such copies happen, in kernels that are traced from now on.

    A copy to shared memory has to be one whatever the indices are that are not known when it is
    traced; a copy from there that is none does not happen.
    """
    load, store = plgpu.copy_gmem_to_smem, plgpu.copy_smem_to_gmem

    def checked_load(source: Any, target: Any, barrier: Any) -> None:
        for index, stride in _places(target):
            step = stride * (index if isinstance(index, int) else 1)
            assert step % TMA_ALIGNMENT == 0, f"a copy to {target} is not aligned"
        load(source, target, barrier)

    def checked_store(source: Any, target: Any) -> None:
        address = sum(index * stride for index, stride in _places(source))
        pl.when(jnp.int32(address) % TMA_ALIGNMENT == 0)(lambda: store(source, target))

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", checked_load)
    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", checked_store)


def _places(view: Any) -> list[tuple[Any, int]]:
    """(index, its stride in bytes) of what leads from shared memory to a view of it."""
    strides: list[int] | None = None
    found: list[tuple[Any, int]] = []
    indexers = [t for t in getattr(view, "transforms", ()) if hasattr(t, "indices")]
    for indexer in indexers:
        if strides is None:
            itemsize = jnp.dtype(view.dtype).itemsize
            shape = indexer.shape
            strides = [itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
        kept = []
        for index, stride in zip(indexer.indices, strides, strict=True):
            is_slice = hasattr(index, "start")
            found.append((index.start if is_slice else index, stride))
            kept += [stride] if is_slice else []
        strides = kept
    return [(int(i) if not hasattr(i, "aval") else i, stride) for i, stride in found]
