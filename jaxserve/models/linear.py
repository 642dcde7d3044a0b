"""Matrices of a model: the linear layer and the embedding table, dense or packed.

Two formats, chosen by `ModelOptions.matmul`. Dense: `[K, *out]` in the model's dtype, contracted as
it lies (a weight is never transposed inside a step). Packed: panels for the native CPU kernel,
which takes float32 activations, skips rows that are not live, and picks its layer out of a stack
by itself.

Every parameter carries `axes`, the logical names of its axes, which `device.sharding` maps to mesh
axes, and `packed`. Layers stacked for a scan have one more leading axis, "layers".
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.models.options import ModelOptions
from pallas_kernels.packed_matmul import api as packed_api


def exact_param(value: Float[Array, "..."], axes: tuple[str | None, ...]) -> nnx.Param:
    """A small parameter (norm scale, bias), float32 whatever the model's dtype."""
    return nnx.Param(value.astype(jnp.float32), axes=axes, packed=False)


def matrix_param(
    shape_KN: tuple[int, int],
    dense_shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    options: ModelOptions,
    rngs: nnx.Rngs,
) -> nnx.Param:
    """A weight with random normal values of variance 1/K.

    Args:
        shape_KN: as the matmul sees it.
        dense_shape, axes: as it is held where it is dense.
    """
    depth, num_columns = shape_KN
    if options.packed:
        dense_shape = (-(-num_columns // packed_api.PANEL), depth, packed_api.PANEL)
        axes = (None, None, None)
    value = jax.random.normal(rngs.params(), dense_shape, jnp.float32) / math.sqrt(depth)
    return nnx.Param(value.astype(options.dtype), axes=axes, packed=options.packed)


def precision(options: ModelOptions) -> jax.lax.Precision:
    """Full float32 products where float32 was asked for, also on platforms that would round."""
    exact = options.activations == "float32"
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """y = x w + b, with an output axis that may have several dimensions."""

    def __init__(
        self,
        in_features: int,
        out_dims: tuple[int, ...],
        options: ModelOptions,
        *,
        axes: tuple[str | None, ...],
        rngs: nnx.Rngs,
        bias: bool = False,
    ) -> None:
        """Builds it.

        Args:
            axes: logical names of the input axis and of each of `out_dims`.
        """
        self.out_dims = out_dims
        self.options = options
        shape_KN = (in_features, math.prod(out_dims))
        self.weight = matrix_param(shape_KN, (in_features, *out_dims), axes, options, rngs)
        self.bias = exact_param(jnp.zeros(out_dims), axes[1:]) if bias else None

    def __call__(
        self,
        x: Float[Array, "T K"],
        num_live: Int[Array, ""] | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> Float[Array, "T *out"]:
        """Applies it; rows from `num_live` on may be anything finite.

        Args:
            layer: which of the stacked weights, where it holds several (packed ones in a scan).
        """
        weight = self.weight[...]
        if self.options.packed:
            y = packed_api.packed_matmul(x, weight, math.prod(self.out_dims), num_live, layer)
            y = y.reshape(x.shape[0], *self.out_dims)
        else:
            y = jax.lax.dot_general(
                x, weight, (((1,), (0,)), ((), ())), precision=precision(self.options)
            )
        return y if self.bias is None else (y + self.bias[...]).astype(y.dtype)


class Embedding(nnx.Module):
    """A table [V, D]: rows are looked up, or are the columns of the output head, or both."""

    def __init__(self, vocab_size: int, hidden_size: int, options: ModelOptions, rngs: nnx.Rngs):
        self.vocab_size = vocab_size
        self.options = options
        self.table = matrix_param(
            (hidden_size, vocab_size),
            (vocab_size, hidden_size),
            ("vocab", "embed"),
            options,
            rngs,
        )

    def lookup(self, token_ids: Int[Array, "T"]) -> Float[Array, "T D"]:
        """The tokens' rows, in the activations' dtype."""
        table = self.table[...]
        if self.options.packed:
            return packed_api.packed_rows(table, token_ids)
        return table.at[token_ids].get(mode="clip").astype(self.options.activations)

    def logits(
        self, x: Float[Array, "B D"], num_live: Int[Array, ""] | None = None
    ) -> Float[Array, "B V"]:
        """x times the transposed table, float32; rows from `num_live` on may be anything finite."""
        table = self.table[...]
        if self.options.packed:
            return packed_api.packed_matmul(x, table, self.vocab_size, num_live)
        return jax.lax.dot_general(
            x,
            table,
            (((1,), (1,)), ((), ())),
            precision=precision(self.options),
            preferred_element_type=jnp.float32,
        )


def encode(param: nnx.Param, path: tuple, dense: np.ndarray | Iterable[np.ndarray]) -> np.ndarray:
    """A dense, logical array in the form in which `param` holds it, still on the host.

    Args:
        path: of the parameter, for messages and to tell tables from weights.
        dense: where the parameter is stacked, its layers, one after the other: they need not all
            exist at once.

    Raises:
        ValueError: the wrong shape, or values beyond the dtype's range.
    """
    if param.get_metadata("axes")[0] != "layers":
        return _encode_one(param, path, np.asarray(dense), param.shape)
    held = np.empty(param.shape, param.dtype)
    num_layers = 0
    for layer, part in enumerate(dense):
        num_layers = layer + 1
        if layer < len(held):
            held[layer] = _encode_one(param, path, part, param.shape[1:])
    if num_layers != len(held):
        raise ValueError(f"has {num_layers} layers, the model takes {param.shape}")
    return held


def _encode_one(
    param: nnx.Param, path: tuple, dense: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    if not param.get_metadata("packed"):
        if dense.shape != shape:
            raise ValueError(f"has shape {dense.shape}, the model takes {shape}")
        return dense.astype(param.dtype)
    if path[-1] == "table":
        dense = dense.T
    packed = packed_api.pack(dense.reshape(dense.shape[0], -1).astype(np.float32), param.dtype)
    if packed.shape != shape:
        raise ValueError(f"has shape {dense.shape}, packed {packed.shape} and not {shape}")
    return packed
