"""Work of one lora_matmul, counted from shapes: the least that any backend must do."""

from __future__ import annotations


def lora_matmul_flops(num_tokens: int, rank: int, num_parts: int, depth: int, columns: int) -> int:
    """Multiply and add, of the tokens that use adapters of one rank."""
    return 2 * num_tokens * rank * (num_parts * depth + columns)


def lora_matmul_bytes(
    num_adapters: int,
    num_tokens: int,
    rank: int,
    num_parts: int,
    depth: int,
    columns: int,
    *,
    weight_bytes: int = 4,
    activation_bytes: int = 4,
) -> int:
    """Both matrices of each adapter that has tokens, once; rows in, and the result in and out."""
    matrices = num_adapters * rank * (num_parts * depth + columns) * weight_bytes
    return matrices + num_tokens * (depth + 2 * columns) * activation_bytes
