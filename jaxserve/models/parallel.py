"""What a model says about the mesh that its step runs on, beside the axes of its parameters.

Matrices are left to XLA's partitioner: from the shardings of the parameters it works out one
all-reduce behind each attention and each MLP. Two things it cannot know are said here: kernels run
on each device's own heads, and how the arrays of the output head lie. Without tensor parallelism
nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxserve.models.options import ModelOptions

#: Mesh axes that a matrix, the heads and the vocabulary are split over, together.
TENSOR_AXES = ("expert", "model")


def over_heads(attend: Callable[..., Any], options: ModelOptions) -> Callable[..., Any]:
    """`Attention._attend` on each device's own heads.

    Args:
        attend: of queries and keys [T, K, G + 1, H], values [T, K, H], pages [L, P, K, …] and the
            layer's inputs; returns [T, K, G, H] and the pages.
    """
    if options.tensor_parallel == 1:
        return attend
    by_token, by_page = PartitionSpec(None, TENSOR_AXES), PartitionSpec(None, None, TENSOR_AXES)
    return jax.shard_map(
        attend,
        in_specs=(by_token, by_token, by_page, PartitionSpec()),
        out_specs=(by_token, by_page),
        axis_names=set(TENSOR_AXES),
        check_vma=False,
    )


def by_vocabulary(logits: Float[Array, "B V"], options: ModelOptions) -> Float[Array, "B V"]:
    """Logits, each device holding those of its own part of the vocabulary."""
    if options.tensor_parallel == 1 or logits.shape[1] % options.tensor_parallel:
        return logits
    return jax.lax.with_sharding_constraint(logits, PartitionSpec(None, TENSOR_AXES))
