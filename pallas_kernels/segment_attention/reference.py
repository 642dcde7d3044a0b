"""Segment attention as plain NumPy, one row and one head at a time: the oracle."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float, Int


def segment_attention(
    qkv: Float[np.ndarray, "T 3 N H"], starts: Int[np.ndarray, "R+1"], scale: float
) -> Float[np.ndarray, "T N H"]:
    """softmax(scale q k') v of each row and head, in float64; zeros for padding tokens."""
    qkv = qkv.astype(np.float64)
    out = np.zeros((qkv.shape[0], *qkv.shape[2:]))
    for first, last in itertools.pairwise(starts):
        for head in range(qkv.shape[2]):
            q, k, v = (qkv[first:last, part, head] for part in range(3))
            scores = scale * q @ k.T
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
            out[first:last, head] = weights @ v / weights.sum(axis=-1, keepdims=True)
    return out
