"""lora_matmul in plain XLA: the blocks of a class as one batched product.

Each block gathers its tokens and its slot's matrices, whose copy is the price of static shapes: it
is paid for `most_blocks`, few of which are empty where most tokens use adapters. A class without
tokens is skipped whole.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lora_matmul.api import LoraWeights
from pallas_kernels.lora_matmul.blocks import TokenBlocks
from pallas_kernels.lora_matmul.reference import part_of_column


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
    """See `api.lora_matmul`."""

    def add(y: Float[Array, "T N"], own: LoraWeights, grouped: TokenBlocks) -> Float[Array, "T N"]:
        rows = take_rows(x, grouped)
        z = jnp.einsum(
            "ubk,uqk->ubq",
            rows,
            own.a[layer, grouped.slots],
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        z = z if reduce is None else reduce(z)
        b = own.b[layer, grouped.slots]
        return put_back(y, expand(z.astype(x.dtype), b, cycle, precision), grouped)

    for own, grouped in zip(weights, blocks, strict=True):
        y = jax.lax.cond(grouped.num_blocks > 0, add, lambda y, *_: y, y, own, grouped)
    return y


def expand_rows(
    z: Float[Array, "T R"],
    y: Float[Array, "T N"],
    b: Float[Array, "S R N"],
    blocks: TokenBlocks,
    precision: jax.lax.Precision,
) -> Float[Array, "T N"]:
    """See `api.expand_rows`."""

    def add(y: Float[Array, "T N"]) -> Float[Array, "T N"]:
        delta = expand(take_rows(z, blocks), b[blocks.slots], (y.shape[1],), precision)
        return put_back(y, delta, blocks)

    return jax.lax.cond(blocks.num_blocks > 0, add, lambda y: y, y)


def expand(
    z: Float[Array, "U B PR"],
    b: Float[Array, "U R N"],
    cycle: tuple[int, ...],
    precision: jax.lax.Precision,
) -> Float[Array, "U B N"]:
    """The product behind, float32; of each column the one with its own part of z."""
    part_N = part_of_column(cycle, b.shape[2])
    rank = b.shape[1]
    delta = jnp.zeros((*z.shape[:2], b.shape[2]), jnp.float32)
    for part in range(len(cycle)):
        own = jnp.einsum(
            "ubr,urn->ubn",
            z[:, :, part * rank : (part + 1) * rank],
            b,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        delta = jnp.where(part_N == part, own, delta)
    return delta


def take_rows(x: Float[Array, "T K"], blocks: TokenBlocks) -> Float[Array, "U B K"]:
    """The tokens of each block; for padding any of them, since nobody asks for its result."""
    return x.at[blocks.tokens].get(mode="clip")


def put_back(
    y: Float[Array, "T N"], delta: Float[Array, "U B N"], blocks: TokenBlocks
) -> Float[Array, "T N"]:
    """y with each token's row of `delta` added, where it has one."""
    flat = delta.reshape(-1, delta.shape[2])
    own = flat.at[blocks.places].get(mode="fill", fill_value=0)
    return (y + own).astype(y.dtype)
