"""The interface of lora_matmul; every backend computes what `reference.py` says.

Math: y[t, n] + sum over r of z[t, p(n), r] b[layer, s(t), r, n], where
z[t, p, r] = sum over k of x[t, k] a[layer, s(t), p R + r, k], s(t) is the token's slot, and p(n)
the part that column n belongs to. Tokens without an adapter keep their y. An adapter's own scale
is in its b.

Parts: a fused matrix (q, k and v, or gate and up) has a product in front for each of its parts
and one array of columns behind, which lie as the base's do. `cycle` says how: (width of part 0, of
part 1, …), over and over until N is full. q, k and v of 2 KV heads with 3 queries each, of 64
columns a head: cycle (192, 64, 64), twice.

Slots come in classes of equal rank, each with arrays of its own, so that an adapter of rank 8 does
not pay for one of rank 128; `weights` and `blocks` have one entry a class.

Shapes: x [T, K], y [T, N], a [L, S, P R, K], b [L, S, R, N]; `blocks` from `block_tokens`.

Traffic: a and b of each adapter that has tokens, once, in and out once; see `traffic`.

Numerics: products accumulated in float32; z is rounded to x's dtype between them. In "cpu" a
token's bits do not depend on its company.

Limits: no gradient. "cpu" takes float32; "tpu" K and N that are multiples of 128; "gpu" bfloat16 or
float16, K and the parts' widths multiples of 64, ranks multiples of 8 up to 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.lora_matmul.blocks import TokenBlocks

BACKENDS = ("xla", "cpu", "tpu", "gpu", "reference")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """One matrix's adapters, of one class of slots, in all layers."""

    a: Float[Array, "L S PR K"]
    b: Float[Array, "L S R N"]


def lora_matmul(
    x: Float[Array, "T K"],
    y: Float[Array, "T N"],
    weights: Sequence[LoraWeights],
    blocks: Sequence[TokenBlocks],
    layer: int | Int[Array, ""],
    *,
    cycle: tuple[int, ...] = (),
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
    reduce: Callable[[Array], Array] | None = None,
    backend: str = "xla",
) -> Float[Array, "T N"]:
    """y and what the tokens' adapters add to it, in y's dtype.

    Args:
        cycle: widths of the parts; empty for one part.
        reduce: applied to z, which is a part of the sum where devices share K; not by "cpu".
        backend: "xla" (any platform), "cpu" (native), "tpu" or "gpu" (Pallas), or
            "reference".

    Raises:
        UnsupportedKernel: the backend cannot run here, or not with these arrays.
        ValueError: shapes that contradict each other, or an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: lora_matmul has {', '.join(BACKENDS)}")
    cycle = cycle or (y.shape[1],)
    for own in weights:
        _check(x, y, own, cycle)
    if backend == "cpu" and (reduce is not None or x.dtype != jnp.float32 or y.dtype != x.dtype):
        raise UnsupportedKernel("lora_matmul: the native kernel takes float32, on one device")
    run = import_module(f"pallas_kernels.lora_matmul.{backend}").lora_matmul
    with jax.named_scope("lora_matmul"):
        layer = jnp.asarray(layer, jnp.int32)
        return run(x, y, tuple(weights), tuple(blocks), layer, cycle, precision, reduce)


def expand_rows(
    z: Float[Array, "T R"],
    y: Float[Array, "T N"],
    b: Float[Array, "S R N"],
    blocks: TokenBlocks,
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
) -> Float[Array, "T N"]:
    """y + z b of each token's slot: the second half alone, for z that were looked up."""
    xla = import_module("pallas_kernels.lora_matmul.xla")
    return xla.expand_rows(z, y, b, blocks, precision)


def unsupported(backend: str) -> str | None:
    """Why a backend cannot run here; None where it can."""
    return import_module("pallas_kernels.native").load().reason if backend == "cpu" else None


def _check(
    x: Float[Array, "T K"], y: Float[Array, "T N"], own: LoraWeights, cycle: tuple[int, ...]
) -> None:
    (layers, slots, wide, depth), (layers_b, slots_b, rank, columns) = own.a.shape, own.b.shape
    fits = (layers, slots, depth, columns) == (layers_b, slots_b, x.shape[1], y.shape[1])
    if not fits or wide != rank * len(cycle) or columns % sum(cycle) or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x {x.shape}, y {y.shape}, a {own.a.shape}, b {own.b.shape}, cycle {cycle}"
        )
