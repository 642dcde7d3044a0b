"""What the Hopper kernels share: shared memory as wgmma reads it, and the ring that TMA fills.

    global memory --TMA--> | slot 0 | slot 1 | slot 2 | …    a ring in shared memory
                               └ ready barrier ─▶ wgmma ─▶ free barrier ─▶ filled again

In all of them one warpgroup of a block of threads copies and the others compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

#: Rows of one wgmma.
ROWS = 64
#: Streaming multiprocessors of an H100.
PROCESSORS = 132
#: Registers of a thread, where two warpgroups compute and a third one only copies.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24
SWIZZLES = (128, 64, 32)
#: What the address of a TMA copy in shared memory is a multiple of.
TMA_ALIGNMENT = 128
#: What wgmma multiplies: float32 only rounded to tf32, which is not what it says.
DTYPES = ("bfloat16", "float16")


def swizzled(shape: Sequence[int], width: int, dtype: DTypeLike) -> Any:
    """Shared memory that TMA fills and wgmma reads without bank conflicts.

    Codes, which no wgmma reads, lie in rows where their keys are no whole number of swizzles.

    Args:
        width: elements that stay together in a row: of a key, where a row is key and value.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next((s for s in SWIZZLES if width * itemsize % s == 0), None)
    if swizzle is None:
        return plgpu.SMEM(tuple(shape), dtype)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    transforms = tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def estimated(cost: pl.CostEstimate) -> dict[str, Any]:
    """What `plgpu.kernel` is told of its cost: nothing before JAX 0.12, which does not ask."""
    takes_it = "cost_estimate" in inspect.signature(plgpu.kernel).parameters
    return {"cost_estimate": cost} if takes_it else {}


def accumulator(rows: int, width: int) -> Any:
    """What wgmma adds to, in registers."""
    return plgpu.ACC((rows, width), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def ahead(count: Any, slots: int, free: Any, load: Callable[[Any, Any], None]) -> None:
    """The copying warpgroup: fills a ring of slots, each as soon as it is free.

    Args:
        count: blocks.
        free: barriers, a slot each, arrived at by whoever has computed it.
        load: starts the copy of a block into a slot.
    """

    def fill(i: Any, _: None) -> None:
        load(i, await_free(free, i, slots))

    lax.fori_loop(0, count, fill, None)
    drain(free, count, slots)


def await_free(free: Any, i: Any, slots: int) -> Any:
    """The slot of a ring's i-th block, once what was in it has been computed."""
    slot = lax.rem(i, jnp.int32(slots))
    pl.when(i >= slots)(lambda: plgpu.barrier_wait(free.at[slot]))
    return slot


def drain(free: Any, count: Any, slots: int) -> None:
    """Waits until the last blocks of a ring have been computed."""

    def wait(i: Any, _: None) -> None:
        plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(slots))])

    lax.fori_loop(jnp.maximum(count - slots, 0), count, wait, None)


def await_ring(ready: Any, slot: Any) -> None:
    """Waits until a slot of a ring is filled.

    Args:
        ready: barriers, a slot each, arrived at by the copies.
    """
    plgpu.barrier_wait(ready.at[slot])


def row_values(rows: Any, like: Any) -> Any:
    """A number of each row, from shared memory [64], over all columns of a product."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    values = plgpu.load(rows, layout=layout, optimized=False)
    return lax.broadcast_in_dim(values, like.shape, [0])
