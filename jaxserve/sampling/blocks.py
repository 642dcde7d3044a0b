"""The vocabulary cut into blocks, and sums over them in a fixed order.

The vocabulary is NUM_PARTS equal runs (the last one padded); block j is the j-th token of every
run. Neighbouring tokens are in different blocks, and a sum over a block is a sum of runs, which
vectorises along them.

A reduction's order is the compiler's choice, and may be another one for another batch size. Here
additions are written out, in an order that is the same everywhere, and the compiler keeps it since
float addition is not associative.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

NUM_PARTS = 32


def in_blocks(logits: Float[Array, "B V"]) -> Float[Array, "B P J"]:
    """Logits by part and block; -inf where padded. Token v is part v // J of block v % J."""
    padding = -logits.shape[1] % NUM_PARTS
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits.reshape(logits.shape[0], NUM_PARTS, -1)


def fold(values: Array, of_slice: Callable[[Array], Array] = lambda part: part) -> Array:
    """Sum over the second axis of [B, N, ...], first to last, of `of_slice` of each slice.

    One fused loop that reads its input once; for the large arrays.
    """
    total = of_slice(values[:, 0])
    for index in range(1, values.shape[1]):
        total = total + of_slice(values[:, index])
    return total


def halve(values: Array) -> Array:
    """Sum over the second axis of [B, N, ...], by adding its halves until one is left.

    Few operations to compile; for the small arrays.
    """
    while (num := values.shape[1]) > 1:
        if num % 2:
            padding = [(0, 0)] * values.ndim
            padding[1] = (0, 1)
            values = jnp.pad(values, padding)
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0]
