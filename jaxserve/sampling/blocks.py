"""The vocabulary cut into blocks, and sums over them in a fixed order.

The vocabulary is NUM_PARTS equal runs (the last one padded) of J tokens; block j is the j-th token
of every run. Neighbouring tokens are in different blocks, and a sum over a block is a sum of runs,
which vectorises along them. Arrays stay as they are, with the runs side by side: given an axis of
its own, a run's slice is one wide, which a TPU pads to 128 where it lets that axis vary fastest.

A reduction's order is the compiler's choice, and may be another one for another batch size. Here
additions are written out, in an order that is the same everywhere, and the compiler keeps it since
float addition is not associative.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

NUM_PARTS = 32


def in_runs(logits: Float[Array, "B V"]) -> Float[Array, "B W"]:
    """Logits of NUM_PARTS whole runs, W = NUM_PARTS J; -inf where padded."""
    padding = -logits.shape[1] % NUM_PARTS
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits


def runs(values: Float[Array, "B W"]) -> list[Float[Array, "B J"]]:
    """Each run by itself; token v is number v % J of run v // J."""
    length = values.shape[1] // NUM_PARTS
    return [values[:, part * length : (part + 1) * length] for part in range(NUM_PARTS)]


def fold(values: Float[Array, "B W"], of_run: Callable[[Array], Array] = lambda run: run) -> Array:
    """Sum over runs, first to last, of `of_run` of each: one of each block.

    One fused loop that reads its input once.
    """
    return functools.reduce(operator.add, map(of_run, runs(values)))


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
