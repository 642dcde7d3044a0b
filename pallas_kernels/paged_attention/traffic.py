"""Work of one paged attention call, counted from shapes: the least that any backend must do."""

from __future__ import annotations

from collections.abc import Iterable


def visible_positions(
    rows: Iterable[tuple[int, int]], window: int | None = None
) -> tuple[int, int]:
    """Positions read from the cache, and (query, position) pairs scored.

    Args:
        rows: (query_len, context_len) of each row.
        window: positions a query sees, itself included; None for all.
    """
    read = scored = 0
    for query_len, context_len in rows:
        if query_len == 0:
            continue
        first = context_len - query_len  # position of the first query
        if window is None:
            read += context_len
            scored += query_len * first + query_len * (query_len + 1) // 2
        else:
            read += min(context_len, query_len + window - 1)
            growing = min(max(window - first, 0), query_len)  # queries that see all before them
            scored += growing * first + growing * (growing + 1) // 2
            scored += (query_len - growing) * window
    return read, scored


def attention_flops(scored: int, *, num_heads: int, head_dim: int) -> int:
    """Multiply and add of q·k and of p·v."""
    return 4 * scored * num_heads * head_dim


def attention_bytes(
    read: int,
    num_tokens: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_bytes: int,
    activation_bytes: int = 4,
) -> int:
    """Each visible key and value once, q in and the result out.

    Args:
        read: positions, from `visible_positions`.
        page_bytes: bytes of one element of the pages.
    """
    cache = 2 * read * num_kv_heads * head_dim * page_bytes
    return cache + 2 * num_tokens * num_heads * head_dim * activation_bytes
