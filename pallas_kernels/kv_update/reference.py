"""The oracle of kv_update: one token after another."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def kv_update(
    k_pages: Float[np.ndarray, "L P K Z H"],
    v_pages: Float[np.ndarray, "L P K Z H"],
    k_new: Float[np.ndarray, "T K H"],
    v_new: Float[np.ndarray, "T K H"],
    layer: int,
    token_pages: Int[np.ndarray, "T"],
    token_offsets: Int[np.ndarray, "T"],
) -> tuple[Float[np.ndarray, "L P K Z H"], Float[np.ndarray, "L P K Z H"]]:
    """Copies of the pages with the tokens written; the null page is left as it is."""
    k_pages, v_pages = k_pages.copy(), v_pages.copy()
    for t, (page, offset) in enumerate(zip(token_pages, token_offsets, strict=True)):
        if page != 0:
            k_pages[layer, page, :, offset] = k_new[t]
            v_pages[layer, page, :, offset] = v_new[t]
    return k_pages, v_pages
