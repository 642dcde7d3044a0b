"""The oracle of quant_matmul: the weight that the codes stand for, multiplied in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int


def int8_weight(
    codes: Int[np.ndarray, "K *out"], scale: Float[np.ndarray, "*out"]
) -> Float[np.ndarray, "K *out"]:
    """Codes times their column's scale, float64."""
    return codes.astype(np.float64) * scale.astype(np.float64)


def fp8_rounded(x: Float[np.ndarray, "T K"]) -> Float[np.ndarray, "T K"]:
    """What is left of x after each row was scaled to float8_e4m3fn, float64."""
    scale = np.abs(x).max(1, keepdims=True).astype(np.float64) / 448
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def int4_weight(
    codes: Int[np.ndarray, "K *out"],
    scale: Float[np.ndarray, "G *out"],
    minimum: Float[np.ndarray, "G *out"],
) -> Float[np.ndarray, "K *out"]:
    """Codes times their group's scale plus its minimum, float64."""
    group = codes.shape[0] // scale.shape[0]
    scale, minimum = (np.repeat(part.astype(np.float64), group, 0) for part in (scale, minimum))
    return codes.astype(np.float64) * scale + minimum


def matmul(
    x: Float[np.ndarray, "T K"], w: Float[np.ndarray, "K *out"]
) -> Float[np.ndarray, "T *out"]:
    """x @ w, float64."""
    return np.tensordot(x.astype(np.float64), w, 1)
