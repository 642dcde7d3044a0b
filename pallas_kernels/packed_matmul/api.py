"""The interface of packed_matmul: float32 activations, float32 or float16 weights, on the CPU.

A weight [K, N] is packed once, at loading, into panels [ceil(N / PANEL), K, PANEL] (the last one
filled up with zeros), so that the kernel reads it strictly in order. The same weight of several
layers may be one array [L, …] with the layer's index given to the call: inside a scan nothing is
sliced out, which would copy it. A tied embedding table [V, D]
is packed as the head's weight, `pack(table.T, dtype)`, and the embedding lookup reads the same
array through `packed_rows`: no second copy.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.packed_matmul import cpu

PANEL = 24
DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


def pack(w_KN: Float[np.ndarray, "K N"], dtype: np.dtype | type) -> Float[np.ndarray, "J K 24"]:
    """Lays a weight out in panels, in `dtype`.

    Raises:
        ValueError: a dtype that the kernel does not read, or values beyond its range.
    """
    dtype = np.dtype(dtype)
    if dtype not in DTYPES:
        raise ValueError(f"cannot pack as {dtype}: give float32 or float16")
    depth, num_columns = w_KN.shape
    num_panels = -(-num_columns // PANEL)
    packed = np.zeros((num_panels, depth, PANEL), dtype)
    whole = num_columns // PANEL
    with np.errstate(over="ignore"):
        body = w_KN[:, : whole * PANEL].reshape(depth, whole, PANEL)
        packed[:whole] = body.transpose(1, 0, 2)
        packed[whole:, :, : num_columns - whole * PANEL] = w_KN[:, whole * PANEL :]
    if dtype == np.float16 and not np.isfinite(packed).all():
        raise ValueError("a weight is beyond the range of float16 (65504): pack as float32")
    return packed


def packed_matmul(
    x: Float[Array, "M K"],
    packed: Float[Array, "*L J K 24"],
    num_columns: int,
    num_rows: Int[Array, ""] | None = None,
    layer: int | Int[Array, ""] | None = None,
) -> Float[Array, "M N"]:
    """x @ w in float32; each row's result depends on neither M, nor its place, nor its company.

    Args:
        packed: from `pack`, or several of them stacked.
        num_columns: N, since the last panel may be partly empty.
        num_rows: live rows, on the device; the others are not read and give zeros, at no cost.
        layer: which of the stacked weights; None where `packed` is one.

    Raises:
        UnsupportedKernel: no native library here (the message says why).
        ValueError: shapes or dtypes that contradict each other.
    """
    if (layer is None) != (packed.ndim == 3):
        raise ValueError(f"packed {packed.shape} and layer={layer!r}: a stack needs a layer")
    num_panels, depth, panel = packed.shape[-3:]
    if depth != x.shape[1] or panel != PANEL or num_panels != -(-num_columns // PANEL):
        raise ValueError(f"x {x.shape} and packed {packed.shape} do not give {num_columns} columns")
    if x.dtype != jnp.float32 or packed.dtype not in DTYPES:
        raise ValueError(
            f"x is {x.dtype} and packed {packed.dtype}: give float32, and float32 or float16"
        )
    reason = unsupported()
    if reason is not None:
        raise UnsupportedKernel(f"packed_matmul: {reason}")
    stack = packed[None] if layer is None else packed
    return cpu.packed_matmul(x, stack, num_columns, num_rows, 0 if layer is None else layer)


def packed_rows(packed: Float[Array, "J K 24"], columns: Int[Array, "T"]) -> Float[Array, "T K"]:
    """Columns of the packed weight, which are rows of the table it was made of, in float32."""
    return packed[columns // PANEL, :, columns % PANEL].astype(jnp.float32)


def unsupported() -> str | None:
    """Why the kernel cannot run here; None where it can."""
    return cpu.unsupported()
