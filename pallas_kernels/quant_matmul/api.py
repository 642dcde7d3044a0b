"""The interface of quant_matmul: activations in float, weights as codes with scales.

Math: int8, one scale an output column: y[t, n] = scale[n] * sum over k of x[t, k] code[k, n].
int4, a scale and a minimum for each GROUP of rows: w[k, n] = code[k, n] * scale[k / GROUP, n] +
minimum[k / GROUP, n]. fp8 × fp8: weights as int8's, and the activations as codes too, one scale a
token, both float8_e4m3fn, so that a Hopper GPU multiplies at twice the rate of bfloat16.

XLA's lowering (`xla`) runs everywhere: compiled for TPU and for an H100, 8-bit codes are widened
inside the matmul and never written to memory. On Hopper it writes int4's products or weights out;
there few tokens have a kernel of their own (`gpu`). The native CPU kernel reads packed codes
instead, see `packed_matmul`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jax
from jaxtyping import Array, Float, Int8, UInt4

from pallas_kernels.quant_matmul import xla

#: 4-bit codes along K that share a scale.
GROUP = 32
BACKENDS = ("xla", "gpu")


def int8_matmul(
    x: Float[Array, "T K"],
    codes: Int8[Array, "K *out"],
    scale: Float[Array, "*out"],
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
    sums: str = "float32",
) -> Float[Array, "T *out"]:
    """x @ (codes * scale), accumulated in float32, in x's dtype.

    Args:
        sums: dtype of the matmul's result before it is scaled. Where devices share K they exchange
            that result: bfloat16 halves the bytes.

    Raises:
        ValueError: shapes that contradict each other.
    """
    if codes.shape[0] != x.shape[-1] or codes.shape[1:] != scale.shape:
        raise ValueError(f"x {x.shape}, codes {codes.shape}, scale {scale.shape}")
    with jax.named_scope("int8_matmul"):
        return xla.int8_matmul(x, codes, scale, precision, sums)


def fp8_matmul(
    x: Float[Array, "T K"],
    codes: Float[Array, "K *out"],
    scale: Float[Array, "*out"],
    sums: str = "float32",
) -> Float[Array, "T *out"]:
    """x @ (codes * scale), with x rounded to float8_e4m3fn, accumulated in float32, in x's dtype.

    Args:
        sums: as for `int8_matmul`.

    Raises:
        ValueError: shapes that contradict each other.
    """
    if codes.shape[0] != x.shape[-1] or codes.shape[1:] != scale.shape:
        raise ValueError(f"x {x.shape}, codes {codes.shape}, scale {scale.shape}")
    with jax.named_scope("fp8_matmul"):
        return xla.fp8_matmul(x, codes, scale, sums)


def int4_matmul(
    x: Float[Array, "T K"],
    codes: UInt4[Array, "K *out"],
    scale: Float[Array, "K/32 *out"],
    minimum: Float[Array, "K/32 *out"],
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
    backend: str = "xla",
) -> Float[Array, "T *out"]:
    """x @ (codes * scale + minimum), accumulated in float32, in x's dtype.

    Args:
        backend: "xla", or "gpu" for few tokens on a Hopper GPU, see `int4_unsupported`.

    Raises:
        ValueError: shapes that contradict each other, or an unknown backend.
        UnsupportedKernel: the backend cannot do this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: int4_matmul has {', '.join(BACKENDS)}")
    groups = (codes.shape[0] // GROUP, *codes.shape[1:])
    if codes.shape[0] != x.shape[-1] or scale.shape != groups or minimum.shape != groups:
        raise ValueError(
            f"x {x.shape}, codes {codes.shape}, scale {scale.shape}, minimum {minimum.shape}"
        )
    with jax.named_scope("int4_matmul"):
        if backend == "gpu":
            return _gpu().int4_matmul(x, codes, scale, minimum)
        return xla.int4_matmul(x, codes, scale, minimum, precision)


def int4_unsupported(num_tokens: int, depth: int, num_columns: int, dtype: Any) -> str | None:
    """Why `int4_matmul` has no kernel for such a product on a Hopper GPU; None where it has.

    Args:
        dtype: of x.
    """
    return _gpu().unsupported(num_tokens, depth, num_columns, dtype)


def _gpu() -> Any:
    """Its module, which brings Mosaic along."""
    return import_module("pallas_kernels.quant_matmul.gpu")
