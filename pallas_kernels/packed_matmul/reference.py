"""The oracle of packed_matmul, and of its layout."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def unpack(packed: Float[np.ndarray, "J K C"], num_columns: int) -> Float[np.ndarray, "K N"]:
    """Panel j holds columns j C … j C + C - 1, row after row; what `pack` did, undone."""
    num_panels, depth, panel = packed.shape
    return packed.transpose(1, 0, 2).reshape(depth, num_panels * panel)[:, :num_columns]


def packed_matmul(
    x: Float[np.ndarray, "M K"],
    packed: Float[np.ndarray, "J K C"],
    num_columns: int,
    num_rows: int | None = None,
) -> Float[np.ndarray, "M N"]:
    """x @ w in float64, rounded once; rows from `num_rows` on are zero."""
    w_KN = unpack(packed, num_columns).astype(np.float64)
    live = np.arange(x.shape[0])[:, None] < (x.shape[0] if num_rows is None else num_rows)
    return (np.where(live, x, 0.0).astype(np.float64) @ w_KN).astype(np.float32)
