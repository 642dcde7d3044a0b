"""The counted work against counting one query at a time."""

from __future__ import annotations

import pytest

from pallas_kernels.kv_update import traffic as update
from pallas_kernels.packed_matmul import traffic as matmul
from pallas_kernels.paged_attention import traffic as attention


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("rows", [[(1, 1)], [(1, 9), (0, 5), (4, 4)], [(5, 12), (12, 12)]])
def test_visible_positions(rows: list[tuple[int, int]], window: int | None) -> None:
    read = scored = 0
    for query_len, context_len in rows:
        seen = set()
        for position in range(context_len - query_len, context_len):
            first = 0 if window is None else max(0, position - window + 1)
            seen |= set(range(first, position + 1))
            scored += position - first + 1
        read += len(seen)
    assert attention.visible_positions(rows, window) == (read, scored)


def test_one_decode_row_by_hand() -> None:
    read, scored = attention.visible_positions([(1, 100)])
    assert attention.attention_flops(scored, num_heads=9, head_dim=64) == 4 * 100 * 9 * 64
    moved = attention.attention_bytes(
        read, 1, num_heads=9, num_kv_heads=3, head_dim=64, page_bytes=2
    )
    assert moved == 2 * 100 * 3 * 64 * 2 + 2 * 9 * 64 * 4


def test_matmul_by_hand() -> None:
    assert matmul.matmul_flops(2, 3, 5) == 60
    assert matmul.matmul_bytes(2, 3, 5, weight_bytes=2) == 30 + 4 * 2 * 8


def test_an_update_by_hand() -> None:
    size = {"num_kv_heads": 3, "head_dim": 64}
    moved = update.kv_update_bytes(5, **size, page_bytes=2, activation_bytes=2)
    assert moved == 5 * 2 * 3 * 64 * (2 + 2)
    codes = update.kv_update_bytes(5, **size, page_bytes=1, scale_bytes=4, activation_bytes=2)
    assert codes == 5 * 2 * 3 * (64 * (2 + 1) + 4)
