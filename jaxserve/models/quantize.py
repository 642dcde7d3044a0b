"""From dense weights to codes: on the host, one matrix at a time, while it is loaded.

int8: one symmetric scale an output column, code in -127 … 127. fp8: the same with float8_e4m3fn
codes, and activations that are rounded to it too. int4: codes 0 … 15 with a scale and
a minimum for each group of 32 along the inputs, fitted by least squares. Embedding tables and
output heads are int8 in all, a scale a token.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int8, UInt8

from pallas_kernels.quant_matmul import GROUP
from pallas_kernels.quantized_pages import LARGEST

QUANTIZATIONS = ("none", "int8", "int4", "fp8")
#: Rounds of fitting scale and minimum to the codes, and the codes to them.
_ROUNDS = 2


def int8_codes(
    w: Float[np.ndarray, "..."], axis: int
) -> tuple[Int8[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Codes, and float32 scales without the axis that is contracted.

    Raises:
        ValueError: w is not finite.
    """
    scaled, scale = _scaled(w, axis, LARGEST["int8"])
    return np.rint(scaled).astype(np.int8), scale


def fp8_codes(
    w: Float[np.ndarray, "..."], axis: int
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Codes as float8_e4m3fn, and float32 scales without the axis that is contracted.

    Raises:
        ValueError: w is not finite.
    """
    scaled, scale = _scaled(w, axis, LARGEST["float8_e4m3fn"])
    return scaled.astype(ml_dtypes.float8_e4m3fn), scale


def int4_codes(
    w: Float[np.ndarray, "K *out"],
) -> tuple[UInt8[np.ndarray, "K *out"], Float[np.ndarray, "G *out"], Float[np.ndarray, "G *out"]]:
    """Codes 0 … 15, and bfloat16 scales and minima of their groups.

    Raises:
        ValueError: w is not finite, or K is not a multiple of the group.
    """
    if w.shape[0] % GROUP:
        raise ValueError(
            f"weights.quantization=int4 takes {GROUP} inputs at a time, this matrix has "
            f"{w.shape[0]}: take int8"
        )
    w = _finite(w).reshape(-1, GROUP, *w.shape[1:])
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    scale, minimum = _rounded((high - low) / 15), _rounded(low)
    code = _nearest(w, scale, minimum)
    for _ in range(_ROUNDS):
        # Least squares of w over the codes; a group of one code keeps what it has.
        code_mean, w_mean = code.mean(1, keepdims=True), w.mean(1, keepdims=True)
        spread = np.square(code - code_mean).sum(1, keepdims=True)
        slope = ((code - code_mean) * (w - w_mean)).sum(1, keepdims=True)
        fitted = slope / np.where(spread > 0, spread, 1)
        scale = np.where(spread > 0, _rounded(fitted), scale)
        minimum = np.where(spread > 0, _rounded(w_mean - scale * code_mean), minimum)
        code = _nearest(w, scale, minimum)
    codes = code.astype(np.uint8).reshape(-1, *w.shape[2:])
    bfloat16 = ml_dtypes.bfloat16
    return codes, scale.squeeze(1).astype(bfloat16), minimum.squeeze(1).astype(bfloat16)


def _scaled(
    w: np.ndarray, axis: int, most: float
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """w with `most` as its largest element along the axis, and the scales, which lack the axis."""
    w = _finite(w)
    largest = np.abs(w).max(axis, keepdims=True)
    scale = np.where(largest > 0, largest / most, 1).astype(np.float32)
    return w / scale, scale.squeeze(axis)


def _finite(w: np.ndarray) -> Float[np.ndarray, "..."]:
    """In float32 and in order: sums, and with them codes, must not depend on how w lies."""
    w = np.ascontiguousarray(w, np.float32)
    if not np.isfinite(w).all():
        raise ValueError("holds values that are not finite, which have no code")
    return w


def _nearest(
    w: Float[np.ndarray, "..."], scale: Float[np.ndarray, "..."], minimum: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """The best codes for these scales, in float32."""
    code = np.rint((w - minimum) / np.where(scale > 0, scale, 1))
    return np.clip(code, 0, 15, out=code)


def _rounded(values: np.ndarray) -> Float[np.ndarray, "..."]:
    """To what bfloat16 can hold."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)
