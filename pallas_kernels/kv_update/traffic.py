"""Work of one kv_update, counted from shapes: the least that any backend must do."""

from __future__ import annotations


def kv_update_bytes(
    num_tokens: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    page_bytes: int,
    scale_bytes: int = 0,
    activation_bytes: int = 4,
) -> int:
    """Each token's key and value in, and written once; nothing of the pages is read.

    Args:
        page_bytes: bytes of one element of the pages.
        scale_bytes: of a key's, or a value's, scale; 0 where pages hold no codes.
    """
    vectors = 2 * num_tokens * num_kv_heads
    return vectors * (head_dim * (activation_bytes + page_bytes) + scale_bytes)
