"""Matrices of a model: the linear layer and the embedding table.

Held in one of two formats, chosen by `ModelOptions.matmul`. Dense: `[K, *out]`, contracted as it
lies (a weight is never transposed inside a step), by XLA; int4 codes on Hopper by a kernel where it
takes the product, which is up to 64 tokens. Packed: panels for the native CPU kernel, which
takes float32 activations, skips rows that are not live, and picks its layer out of a stack by
itself. Either holds values in the model's dtype, or codes (`ModelOptions.quantization`, see
`models.quantize`) with a `scale`, and for int4 a `minimum`, in parameters of their own.

Every parameter carries `axes`, the logical names of its axes, which `device.sharding` maps to mesh
axes, and `packed`; a matrix carries `codes` and `contracted` too, and `whole` where its kernel
takes the stack of all layers. Layers stacked for a scan have one more leading axis, "layers".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.errors import ConfigError
from jaxserve.models.options import ModelOptions
from jaxserve.models.parallel import over_shares, split_axes
from jaxserve.models.quantize import fp8_codes, int4_codes, int8_codes
from pallas_kernels import packed_matmul as packing
from pallas_kernels import quant_matmul

Path = tuple[str | int, ...]
#: Parameters that belong to a quantized matrix, beside it.
_BESIDE = ("scale", "minimum")
#: Input axes that devices share: each has a part of the sum, and they exchange it.
SPLIT_INPUTS = ("heads", "mlp")


def exact_param(value: Float[Array, "..."], axes: tuple[str | None, ...]) -> nnx.Param:
    """A small parameter (norm scale, bias), float32 whatever the model's dtype."""
    return nnx.Param(value.astype(jnp.float32), axes=axes, packed=False)


class Matrix(NamedTuple):
    """The parameters of one matrix."""

    weight: nnx.Param
    scale: nnx.Param | None
    minimum: nnx.Param | None


def random_matrix(
    shape: tuple[int, ...],
    contracted: int,
    axes: tuple[str | None, ...],
    codes: str,
    options: ModelOptions,
    rngs: nnx.Rngs,
    *,
    whole: bool = False,
) -> Matrix:
    """A matrix of random values of variance 1/K.

    Args:
        shape, axes: as it is held where it is dense.
        contracted: which of its axes is K.
        codes: "none", "int8", "int4" or "fp8".
        whole: whether its kernel takes the stack of all layers and picks one itself.

    Raises:
        ConfigError: int4 codes were asked for, but K is not a multiple of their group.
    """
    depth = shape[contracted]
    outer = tuple(size for axis, size in enumerate(shape) if axis != contracted)
    outer_axes = tuple(name for axis, name in enumerate(axes) if axis != contracted)
    num_groups = depth // packing.GROUP if codes == "int4" else 1
    groups, group_axes = (num_groups, *outer), axes
    if codes in ("int8", "fp8"):
        groups, group_axes = outer, outer_axes
    if codes == "int4" and depth % packing.GROUP:
        raise ConfigError(
            f"weights.quantization=int4 takes {packing.GROUP} inputs at a time, this model has a "
            f"matrix of {depth}: set weights.quantization=int8"
        )
    if options.packed:
        panels, lanes = -(-math.prod(outer) // packing.PANEL), packing.PANEL
        shape, axes = (panels, depth // 2 if codes == "int4" else depth, lanes), (None,) * 3
        groups, group_axes = (panels, num_groups, lanes), (None,) * 3
    deviation, key = 1 / math.sqrt(depth), rngs.params()

    def matrix_param(value: Array) -> nnx.Param:
        return nnx.Param(
            value,
            axes=axes,
            packed=options.packed,
            codes=codes,
            contracted=contracted,
            whole=whole,
        )

    def group_param(value: float, dtype: str) -> nnx.Param:
        full = jnp.full(groups, value, dtype)
        return nnx.Param(full, axes=group_axes, packed=options.packed)

    if codes == "none":
        value = deviation * jax.random.normal(key, shape, jnp.float32)
        return Matrix(matrix_param(value.astype(options.dtype)), None, None)
    if codes == "int8":  # uniform in ±1 has deviation 1/√3
        value = jax.random.randint(key, shape, -127, 128, jnp.int8)
        scale = group_param(deviation * math.sqrt(3) / 127, "float32")
        return Matrix(matrix_param(value), scale, None)
    if codes == "fp8":
        value = jax.random.normal(key, shape, jnp.float32).astype(jnp.float8_e4m3fn)
        return Matrix(matrix_param(value), group_param(deviation, "float32"), None)
    bits = jax.random.bits(key, shape, jnp.uint8)
    value = bits if options.packed else (bits & 15).astype(jnp.uint4)
    step = deviation * math.sqrt(12) / 16
    scale, minimum = group_param(step, "bfloat16"), group_param(-7.5 * step, "bfloat16")
    return Matrix(matrix_param(value), scale, minimum)


def precision(options: ModelOptions) -> jax.lax.Precision:
    """Full float32 products where float32 was asked for, also on platforms that would round."""
    exact = options.activations == "float32"
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def weight_bytes(options: ModelOptions) -> float:
    """Bytes that one weight of a linear layer is held in; scales of whole columns not counted."""
    if options.quantization == "int4":
        return 0.5 + 2 * 2 / packing.GROUP
    return 1 if options.quantization in ("int8", "fp8") else jnp.dtype(options.dtype).itemsize


def table_bytes(options: ModelOptions) -> int:
    """Bytes that one weight of a table is held in."""
    return jnp.dtype(options.dtype).itemsize if options.quantization == "none" else 1


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
        self.axes = axes
        self.options = options
        summed = options.tensor_parallel > 1 and axes[0] in SPLIT_INPUTS
        self.sums = options.activations if summed else "float32"
        shape = (in_features, *out_dims)
        matrix = random_matrix(shape, 0, axes, options.quantization, options, rngs)
        self.weight, self.scale, self.minimum = matrix
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
        if self.options.packed:
            y = self._multiply_packed(x, num_live, layer)
        else:
            y = self._multiply_dense(x)
        return y if self.bias is None else (y + self.bias[...]).astype(y.dtype)

    def _multiply_dense(self, x: Float[Array, "T K"]) -> Float[Array, "T *out"]:
        weight, exactly = self.weight[...], precision(self.options)
        if self.scale is None:
            return jax.lax.dot_general(x, weight, (((1,), (0,)), ((), ())), precision=exactly)
        scale = self.scale[...]
        if self.options.quantization == "fp8":
            return quant_matmul.fp8_matmul(x, weight, scale, self.sums)
        if self.minimum is None:
            return quant_matmul.int8_matmul(x, weight, scale, exactly, self.sums)
        # Codes of a group stay together, so that its scale is where they are.
        split = split_axes(self.axes, scale.shape, self.options)
        multiply = partial(self._multiply_int4, exactly)
        return over_shares(multiply, split)(x, weight, scale, self.minimum[...])

    def _multiply_int4(
        self, exactly: jax.lax.Precision, x: Array, codes: Array, scale: Array, minimum: Array
    ) -> Float[Array, "T *out"]:
        backend = "xla"
        if self.options.matmul == "gpu":
            columns = math.prod(codes.shape[1:])
            reason = quant_matmul.int4_unsupported(x.shape[0], x.shape[1], columns, x.dtype)
            backend = "gpu" if reason is None else "xla"
        return quant_matmul.int4_matmul(x, codes, scale, minimum, exactly, backend)

    def _multiply_packed(
        self,
        x: Float[Array, "T K"],
        num_live: Int[Array, ""] | None,
        layer: Int[Array, ""] | None,
    ) -> Float[Array, "T *out"]:
        weight = _panels(self.weight, self.scale, self.minimum)
        y = packing.packed_matmul(x, weight, math.prod(self.out_dims), num_live, layer)
        return y.reshape(x.shape[0], *self.out_dims)


def _panels(
    weight: nnx.Param, scale: nnx.Param | None, minimum: nnx.Param | None = None
) -> Array | packing.CodePanels:
    if scale is None:
        return weight[...]
    lowest = None if minimum is None else minimum[...]
    return packing.CodePanels(weight[...], scale[...], lowest)


class Embedding(nnx.Module):
    """A table [V, D]: rows are looked up, or are the columns of the output head, or both."""

    def __init__(self, vocab_size: int, hidden_size: int, options: ModelOptions, rngs: nnx.Rngs):
        self.vocab_size = vocab_size
        self.options = options
        codes = "none" if options.quantization == "none" else "int8"
        shape, axes = (vocab_size, hidden_size), ("vocab", "embed")
        self.table, self.scale, _ = random_matrix(shape, 1, axes, codes, options, rngs)

    def lookup(self, token_ids: Int[Array, "T"]) -> Float[Array, "T D"]:
        """The tokens' rows, in the activations' dtype."""
        table = self.table[...]
        scale = None if self.scale is None else self.scale[...]
        if self.options.packed:
            rows = packing.packed_rows(table, token_ids)
            scale = None if scale is None else packing.packed_rows(scale, token_ids)
        else:
            rows = table.at[token_ids].get(mode="clip")
            scale = None if scale is None else scale.at[token_ids].get(mode="clip")[:, None]
        return (rows if scale is None else rows * scale).astype(self.options.activations)

    def logits(
        self, x: Float[Array, "B D"], num_live: Int[Array, ""] | None = None
    ) -> Float[Array, "B V"]:
        """x times the transposed table, float32; rows from `num_live` on may be anything finite."""
        if self.options.packed:
            panels = _panels(self.table, self.scale)
            return packing.packed_matmul(x, panels, self.vocab_size, num_live)
        table = self.table[...]
        y = jax.lax.dot_general(
            x,
            table if self.scale is None else table.astype(x.dtype),
            (((1,), (1,)), ((), ())),
            precision=precision(self.options),
            preferred_element_type=jnp.float32,
        )
        return y if self.scale is None else y * self.scale[...]


def encode(
    params: Mapping[Path, nnx.Param], path: Path, dense: np.ndarray | Iterable[np.ndarray]
) -> dict[Path, np.ndarray]:
    """A dense, logical array in the form in which a model holds it, still on the host.

    Args:
        params: of the model.
        path: of the parameter that the array is for.
        dense: where the parameter is stacked, its layers, one after the other: they need not all
            exist at once.

    Returns:
        That parameter's array, and those of its `scale` and `minimum` where it is quantized.

    Raises:
        ValueError: the wrong shape, values beyond the dtype's range, or without a code.
    """
    param, paths = params[path], matrix_paths(params, path)
    shapes = [params[p].shape for p in paths]
    if param.get_metadata("axes")[0] != "layers":
        return dict(zip(paths, encode_layer(param, path, np.asarray(dense), shapes), strict=True))
    held = [np.empty(params[p].shape, params[p].dtype) for p in paths]
    num_layers = 0
    for layer, part in enumerate(dense):
        num_layers = layer + 1
        if layer < param.shape[0]:
            parts = encode_layer(param, path, part, [shape[1:] for shape in shapes])
            for whole, encoded in zip(held, parts, strict=True):
                whole[layer] = encoded
    if num_layers != param.shape[0]:
        raise ValueError(f"has {num_layers} layers, the model takes {param.shape}")
    return dict(zip(paths, held, strict=True))


def matrix_paths(params: Mapping[Path, nnx.Param], path: Path) -> list[Path]:
    """Of a parameter, and of its `scale` and `minimum` where it is quantized."""
    if params[path].get_metadata("codes", "none") == "none":
        return [path]
    beside = ((*path[:-1], name) for name in _BESIDE)
    return [path, *(near for near in beside if near in params)]


def encode_layer(
    param: nnx.Param, path: Path, dense: np.ndarray, shapes: list[tuple[int, ...]]
) -> list[np.ndarray]:
    """One layer's part of `encode`, as a list; and of a layer's experts, any number of them.

    Args:
        shapes: that the parts must come out in.

    Raises:
        ValueError: as `encode`.
    """
    codes, is_packed = param.get_metadata("codes", "none"), param.get_metadata("packed")
    contracted = param.get_metadata("contracted", 0)
    parts: list[np.ndarray] = [dense]
    if codes == "int8":
        parts = list(int8_codes(dense, contracted))
    elif codes == "fp8":
        parts = list(fp8_codes(dense, contracted))
    elif codes == "int4":
        parts = list(int4_codes(dense))
    if is_packed:
        parts = _packed(parts, contracted, codes, param.dtype)
    else:
        parts[0] = parts[0].astype(ml_dtypes.uint4 if codes == "int4" else param.dtype)
    for part, shape in zip(parts, shapes, strict=True):
        if part.shape != shape:
            held = f", {'packed' if is_packed else 'as codes'} {part.shape}"
            held = "" if part.shape == dense.shape else held
            raise ValueError(f"has shape {dense.shape}{held}, the model takes {shape}")
    return parts


def _packed(
    parts: list[np.ndarray], contracted: int, codes: str, dtype: np.dtype
) -> list[np.ndarray]:
    first, *beside = parts
    if contracted:
        first = first.T
    first = first.reshape(first.shape[0], -1)
    if codes == "none":
        return [packing.pack(first.astype(np.float32), dtype)]
    groups = (1, -1) if codes == "int8" else (beside[0].shape[0], -1)
    packed = packing.pack(first, dtype) if codes == "int8" else packing.pack_int4(first)
    return [packed, *(packing.pack_groups(part.reshape(groups)) for part in beside)]
