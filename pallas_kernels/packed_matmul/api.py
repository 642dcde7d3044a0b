"""The interface of packed_matmul: float32 activations, weights from 32 to 4 bits, on the CPU.

A weight [K, N] is packed once, at loading, into panels [ceil(N / PANEL), K, PANEL] (the last one
filled up with zeros), so that the kernel reads it strictly in order. The same weight of several
layers may be one array [L, …] with the layer's index given to the call: inside a scan nothing is
sliced out, which would copy it. A tied embedding table [V, D]
is packed as the head's weight, `pack(table.T, dtype)`, and the embedding lookup reads the same
array through `packed_rows`: no second copy.

Quantized weights are `CodePanels`. int8: packed like any weight, with a scale for each column.
4-bit codes (0 … 15): packed two in a byte by `pack_int4`, with a bfloat16 scale and minimum of each
GROUP of them along K, w = code * scale + minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.packed_matmul import cpu

PANEL = 24
#: 4-bit codes along K that share a scale.
GROUP = 32
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int8))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class CodePanels:
    """A packed weight of codes, or several stacked; G is 1 for int8 and K / GROUP for 4 bits.

    Attributes:
        codes: int8; or uint8, depth 2k in the low half of a byte and 2k + 1 in the high one.
        scale: float32 for int8, bfloat16 for 4 bits.
        minimum: of the groups of 4-bit codes, bfloat16; None for int8.
    """

    codes: Int[Array, "*L J _ 24"]
    scale: Float[Array, "*L J G 24"]
    minimum: Float[Array, "*L J G 24"] | None = None


def pack(w_KN: Shaped[np.ndarray, "K N"], dtype: np.dtype | type) -> Shaped[np.ndarray, "J K 24"]:
    """Lays a weight out in panels, in `dtype`.

    Raises:
        ValueError: a dtype that the kernel does not read, or values beyond its range.
    """
    dtype = np.dtype(dtype)
    if dtype not in DTYPES:
        raise ValueError(f"cannot pack as {dtype}: give float32, float16, or int8 codes")
    with np.errstate(over="ignore"):
        packed = _panels(w_KN, dtype)
    if dtype == np.float16 and not np.isfinite(packed).all():
        raise ValueError("a weight is beyond the range of float16 (65504): pack as float32")
    return packed


def pack_int4(codes_KN: UInt8[np.ndarray, "K N"]) -> UInt8[np.ndarray, "J K/2 24"]:
    """Lays 4-bit codes out in panels, two in a byte.

    Raises:
        ValueError: K is not a multiple of GROUP.
    """
    if codes_KN.shape[0] % GROUP:
        raise ValueError(f"4-bit codes come in groups of {GROUP} along K, got {codes_KN.shape}")
    return _panels(codes_KN[::2] | codes_KN[1::2] << 4, np.dtype(np.uint8))


def pack_groups(values_GN: Shaped[np.ndarray, "G N"]) -> Shaped[np.ndarray, "J G 24"]:
    """Lays scales or minima out in panels, in their own dtype."""
    return _panels(values_GN, values_GN.dtype)


def _panels(w_KN: Shaped[np.ndarray, "K N"], dtype: np.dtype) -> Shaped[np.ndarray, "J K 24"]:
    depth, num_columns = w_KN.shape
    packed = np.zeros((-(-num_columns // PANEL), depth, PANEL), dtype)
    whole = num_columns // PANEL
    body = w_KN[:, : whole * PANEL].reshape(depth, whole, PANEL)
    packed[:whole] = body.transpose(1, 0, 2)
    packed[whole:, :, : num_columns - whole * PANEL] = w_KN[:, whole * PANEL :]
    return packed


def packed_matmul(
    x: Float[Array, "M K"],
    packed: Float[Array, "*L J K 24"] | CodePanels,
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
    has_codes = isinstance(packed, CodePanels)
    first = packed.codes if has_codes else packed
    if (layer is None) != (first.ndim == 3):
        raise ValueError(f"packed {first.shape} and layer={layer!r}: a stack needs a layer")
    num_panels, depth, panel = first.shape[-3:]
    depth *= 2 if has_codes and packed.minimum is not None else 1
    if depth != x.shape[1] or panel != PANEL or num_panels != -(-num_columns // PANEL):
        raise ValueError(f"x {x.shape} and packed {first.shape} do not give {num_columns} columns")
    readable = first.dtype in (np.int8, np.uint8) if has_codes else first.dtype in DTYPES[:2]
    if x.dtype != jnp.float32 or not readable:
        raise ValueError(
            f"x is {x.dtype} and packed {first.dtype}: give float32, and float32, float16 or codes"
        )
    reason = unsupported()
    if reason is not None:
        raise UnsupportedKernel(f"packed_matmul: {reason}")
    if layer is None:
        packed, layer = jax.tree.map(lambda w: w[None], packed), 0
    return cpu.packed_matmul(x, jax.tree.leaves(packed), num_columns, num_rows, layer)


def packed_rows(packed: Shaped[Array, "J K 24"], columns: Int[Array, "T"]) -> Float[Array, "T K"]:
    """Columns of the packed weight, which are rows of the table it was made of, in float32."""
    return packed[columns // PANEL, :, columns % PANEL].astype(jnp.float32)


def unsupported() -> str | None:
    """Why the kernel cannot run here; None where it can."""
    return cpu.unsupported()
