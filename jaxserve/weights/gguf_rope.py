"""Llama 3's rotary scaling, found again from the factors that a GGUF file holds in its place.

llama.cpp's converter evaluates the scaling into one divisor for each frequency. Math: with the
wavelength w of a frequency, share s = clip((old/w - low) / (high - low), 0, 1), the divisor is
1 / ((1 - s) / factor + s). Several (low, high, old) give the same divisors: any of them will do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

LLAMA3_FACTORS = "rope_freqs.weight"
_TOLERANCE = 1e-4
#: Contexts to try with the released low_freq_factor 1 and high_freq_factor 4: Llama's own first.
_CONTEXTS = (8192, *(2**i for i in range(4, 21)))


def llama3_scaling(
    factors: Float[np.ndarray, "H/2"], head_dim: int, theta: float
) -> dict[str, Any] | None:
    """HF's rope_scaling whose divisors are `factors`; None if there is none."""
    wanted = np.asarray(factors, np.float64).ravel()
    if len(wanted) != head_dim // 2 or not np.isfinite(wanted).all() or wanted.min() < 1:
        return None
    turns = theta ** (-np.arange(len(wanted)) / len(wanted)) / (2 * np.pi)  # 1 / wavelength
    factor = float(str(np.float32(wanted.max())))
    candidates = [(1.0, 4.0, old) for old in _CONTEXTS]
    candidates += _fitted(wanted, turns, factor)
    for low, high, old in candidates:
        share = np.clip((old * turns - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - share) / factor + share), wanted, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": old,
            }
    return None


def _fitted(
    wanted: Float[np.ndarray, "H/2"], turns: Float[np.ndarray, "H/2"], factor: float
) -> list[tuple[float, float, int]]:
    """(low, high, 8192) of the line through the shares that are neither 0 nor 1."""
    between = (wanted > 1 + _TOLERANCE) & (wanted < factor * (1 - _TOLERANCE))
    if between.sum() < 2:
        return []
    share = (1 / wanted[between] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(turns[between], share, 1)
    if slope <= 0 or offset >= 0:
        return []
    old = _CONTEXTS[0]
    span = old / slope
    return [(float(-offset * span), float((1 - offset) * span), old)]
