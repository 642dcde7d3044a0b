"""The oracle of kv_update: one token after another."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def kv_update(
    pages: Float[np.ndarray, "L P K Z W"],
    k_new: Float[np.ndarray, "T K H"],
    v_new: Float[np.ndarray, "T K H"],
    layer: int,
    token_pages: Int[np.ndarray, "T"],
    token_offsets: Int[np.ndarray, "T"],
) -> Float[np.ndarray, "L P K Z W"]:
    """A copy of the pages with the tokens written; the null page is left as it is."""
    pages = pages.copy()
    head_dim, half = k_new.shape[2], pages.shape[4] // 2
    for t, (page, offset) in enumerate(zip(token_pages, token_offsets, strict=True)):
        if page != 0:
            pages[layer, page, :, offset, :head_dim] = k_new[t]
            pages[layer, page, :, offset, half : half + head_dim] = v_new[t]
    return pages
