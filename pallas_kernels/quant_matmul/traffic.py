"""Bytes of quantized weights, counted from shapes."""

from __future__ import annotations

from pallas_kernels.quant_matmul.api import GROUP


def int8_bytes(depth: int, num_columns: int) -> int:
    """A code a weight, and a float32 scale a column."""
    return depth * num_columns + 4 * num_columns


def int4_bytes(depth: int, num_columns: int) -> int:
    """Half a byte a weight, and a bfloat16 scale and minimum a group."""
    return depth * num_columns // 2 + 4 * (depth // GROUP) * num_columns
