"""The native lora_matmul (`cpu.cc`) as a JAX function."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import native
from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.lora_matmul.api import LoraWeights
from pallas_kernels.lora_matmul.blocks import TokenBlocks


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
    reason = native.load().reason
    if reason is not None:
        raise UnsupportedKernel(f"lora_matmul: {reason}")
    of_classes = []
    for own, grouped in zip(weights, blocks, strict=True):
        of_classes += [own.a, own.b, grouped.tokens, grouped.slots, grouped.num_blocks]
    call = jax.ffi.ffi_call(
        "jaxserve_lora_matmul",
        jax.ShapeDtypeStruct(y.shape, jnp.float32),
        input_output_aliases={2: 0},
    )
    return call(x, layer, y, *of_classes, cycle=np.asarray(cycle, np.int64))
