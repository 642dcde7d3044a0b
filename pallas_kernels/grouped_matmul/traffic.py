"""Work of one grouped matmul, counted from shapes: the least that any backend must do."""

from __future__ import annotations


def touched_groups(num_groups: int, num_tokens: int, groups_per_token: int) -> float:
    """Groups that have rows, expected, where each token picks different ones with equal chances.

    A token leaves a given group out with probability 1 - groups_per_token / num_groups.
    """
    return num_groups * (1 - (1 - groups_per_token / num_groups) ** num_tokens)


def grouped_matmul_flops(num_rows: int, depth: int, num_columns: int) -> int:
    """Multiply and add."""
    return 2 * num_rows * depth * num_columns


def grouped_matmul_bytes(
    touched: float,
    num_rows: int,
    depth: int,
    num_columns: int,
    *,
    weight_bytes: float,
    activation_bytes: int = 4,
) -> float:
    """The matrix of each group that has rows, once, rows in and the result out.

    Args:
        touched: groups with rows.
        weight_bytes: bytes of one weight; scales of whole columns are not counted.
    """
    matrices = touched * depth * num_columns * weight_bytes
    return matrices + num_rows * (depth + num_columns) * activation_bytes
