"""Work of one packed matmul, counted from shapes."""

from __future__ import annotations


def matmul_flops(num_rows: int, depth: int, num_columns: int) -> int:
    """Multiply and add."""
    return 2 * num_rows * depth * num_columns


def matmul_bytes(num_rows: int, depth: int, num_columns: int, *, weight_bytes: int) -> int:
    """The weight once, x in and the result out in float32."""
    return depth * num_columns * weight_bytes + 4 * num_rows * (depth + num_columns)
