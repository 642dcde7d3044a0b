"""The oracle of lora_matmul: every token fetches its adapter's matrices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.lora_matmul.api import LoraWeights
from pallas_kernels.lora_matmul.blocks import TokenBlocks


def part_of_column(cycle: tuple[int, ...], num_columns: int) -> Int[np.ndarray, "N"]:
    """p(n)."""
    parts = np.repeat(np.arange(len(cycle)), cycle)
    return np.tile(parts, num_columns // len(parts))


def lora_matmul(
    x: Float[Array, "T K"],
    y: Float[Array, "T N"],
    weights: tuple[LoraWeights, ...],
    blocks: tuple[TokenBlocks, ...],
    layer: Int[Array, ""],
    cycle: tuple[int, ...],
    precision: jax.lax.Precision,
    reduce: Callable[[Array], Array] | None,
) -> Float[Array, "T N"]:
    """See `api.lora_matmul`; holds matrices for each token, so for small shapes only."""
    part_N = part_of_column(cycle, y.shape[1])
    total = y.astype(jnp.float32)
    for own, grouped in zip(weights, blocks, strict=True):
        size = grouped.tokens.shape[1]
        has_T = grouped.places < grouped.tokens.size
        slot_T = grouped.slots[jnp.where(has_T, grouped.places // size, 0)]
        a, b = own.a[layer, slot_T].astype(jnp.float32), own.b[layer, slot_T].astype(jnp.float32)
        z = jnp.einsum("tk,tqk->tq", x.astype(jnp.float32), a, precision=precision)
        z = z if reduce is None else reduce(z)
        z = z.astype(x.dtype).astype(jnp.float32).reshape(x.shape[0], len(cycle), -1)
        delta = jnp.einsum("tnr,trn->tn", z[:, part_N], b, precision=precision)
        total = total + jnp.where(has_T[:, None], delta, 0)
    return total.astype(y.dtype)
