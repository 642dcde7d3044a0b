"""Hopper kernels whose copies come late, and that do not wait for them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper


def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is copied into the ring only after it has been computed; nothing waits for it.

    What the memory holds before is not a number. With the waits this would stand still.
    """

    def after_it_was_computed(free: Any, i: Any, slots: int) -> Any:
        slot = lax.rem(i, jnp.int32(slots))
        plgpu.barrier_wait(free.at[slot])
        return slot

    monkeypatch.setattr(hopper, "await_free", after_it_was_computed)
    monkeypatch.setattr(hopper, "drain", lambda free, count, slots: None)
    monkeypatch.setattr(hopper, "await_ring", lambda ready, slot: None)
