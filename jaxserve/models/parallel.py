"""What a model says about the mesh that its step runs on, beside the axes of its parameters.

Matrices are left to XLA's partitioner: from the shardings of the parameters it works out one
all-reduce behind each attention and each MLP. What it cannot know is said here: kernels run on each
device's own heads, and on its own part of a matrix of 4-bit codes; each device's experts take their
own tokens; and how the arrays of the output head lie. Without tensor parallelism nothing here does
anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import MoeSpec

#: Mesh axes that a matrix, the heads and the vocabulary are split over, together.
TENSOR_AXES = ("expert", "model")

#: Logical axis of a parameter → mesh axes. An unknown name is an error.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": TENSOR_AXES,
    "heads": TENSOR_AXES,
    "kv_heads": TENSOR_AXES,
    "mlp": TENSOR_AXES,
    "experts": "expert",
    "expert_mlp": "model",
    "embed": None,
    "layers": None,
}


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


def over_experts(
    mix: Callable[..., Any], options: ModelOptions, moe: MoeSpec
) -> Callable[..., Float[Array, "T D"]]:
    """`MixtureMLP._mix` on each device's own experts, or its own columns of them, and one sum.

    The partitioner would do it otherwise: gather the matrices, since it cannot know that a token
    needs only some of them. An axis of the mesh that does not divide the experts, or their
    columns, holds copies (`device.sharding.partition`): those all compute the same, once.

    Args:
        mix: of tokens, their experts and weights, matrices, the layer, what adapters add, and the
            first expert.
    """
    if options.tensor_parallel == 1:
        return partial(mix, first_expert=0)
    sizes = jax.sharding.get_abstract_mesh().shape
    experts = None if moe.num_experts % sizes["expert"] else "expert"
    columns = None if moe.feed_forward % sizes["model"] else "model"

    def own(
        x: Array,
        experts_TA: Array,
        weights_TA: Array,
        matrices: Any,
        layer: Array | None,
        deltas: Any,
    ) -> Float[Array, "T D"]:
        first = 0
        if experts is not None:
            first = jax.lax.axis_index(experts) * matrices.gate.weight.shape[-3]
        mixed = mix(x, experts_TA, weights_TA, matrices, layer, deltas, first_expert=first)
        summed = tuple(axis for axis in (experts, columns) if axis is not None)
        return jax.lax.psum(mixed, summed) if summed else mixed

    def run(
        x: Array,
        experts_TA: Array,
        weights_TA: Array,
        matrices: Any,
        layer: Array | None,
        deltas: Any,
    ) -> Float[Array, "T D"]:
        stack = (None,) * (matrices.gate.weight.ndim - 3)

        def of_matrix(matrix: Any, rows: str | None, columns: str | None) -> Any:
            scale = None if matrix.scale is None else PartitionSpec(experts, columns)
            return matrix._replace(
                weight=PartitionSpec(*stack, experts, rows, columns), scale=scale
            )

        specs = matrices._replace(
            gate=of_matrix(matrices.gate, None, columns),
            up=of_matrix(matrices.up, None, columns),
            down=of_matrix(matrices.down, columns, None),
        )
        whole = PartitionSpec()
        added = None if deltas is None else deltas.specs(experts, columns)
        return jax.shard_map(
            own,
            in_specs=(whole, whole, whole, specs, None if layer is None else whole, added),
            out_specs=whole,
            axis_names=set(TENSOR_AXES),
            check_vma=False,
        )(x, experts_TA, weights_TA, matrices, layer, deltas)

    return run


def split_axes(
    axes: Sequence[str | None], shape: Sequence[int], options: ModelOptions
) -> tuple[bool, ...]:
    """Which axes of a dense matrix, not of experts, the devices share: as RULES say and divides."""
    parts = options.tensor_parallel
    return tuple(
        axis is not None and RULES[axis] == TENSOR_AXES and size % parts == 0 and parts > 1
        for axis, size in zip(axes, shape, strict=True)
    )


def over_shares(
    multiply: Callable[..., Float[Array, "T *out"]], split: tuple[bool, ...]
) -> Callable[..., Float[Array, "T *out"]]:
    """A product with a matrix of codes on each device's own part of it.

    Args:
        multiply: of tokens [T, K], and codes, scales and minima, all with the matrix's axes.
        split: which of those axes the devices share. Where K is one they exchange their sums, in
            the dtype of the product.
    """
    if not any(split):
        return multiply
    matrix = PartitionSpec(*(TENSOR_AXES if axis else None for axis in split))

    def own(x: Array, *arrays: Array) -> Array:
        y = multiply(x, *arrays)
        return jax.lax.psum(y, TENSOR_AXES) if split[0] else y

    return jax.shard_map(
        own,
        in_specs=(PartitionSpec(None, matrix[0]), matrix, matrix, matrix),
        out_specs=PartitionSpec(None, *matrix[1:]),
        axis_names=set(TENSOR_AXES),
        check_vma=False,
    )


def by_vocabulary(logits: Float[Array, "B V"], options: ModelOptions) -> Float[Array, "B V"]:
    """Logits, each device holding those of its own part of the vocabulary."""
    if options.tensor_parallel == 1 or logits.shape[1] % options.tensor_parallel:
        return logits
    return jax.lax.with_sharding_constraint(logits, PartitionSpec(None, TENSOR_AXES))
