"""quant_matmul as XLA lowers it.

Traffic: int8, the codes once: the conversion is fused into the matmul. int4 with few tokens, codes
and scales once: each group is multiplied by itself, as one matmul of a batch, and the groups' sums
are scaled and added; nothing as large as the weight exists. With many tokens that would keep the
matrix unit at GROUP of its depth, so the weight is written out in x's dtype first: it is read for
so many tokens that this is the smaller cost.

On an H100, 4-bit codes are no gain: XLA writes their products group by group to memory, or the
whole weight. See `gpu` for the kernel that few tokens take there.

Numerics: codes are exact in bfloat16; sums and scaling in float32, but int8's and fp8's sums are
handed from the matmul to the scaling in the dtype that is asked for. With many tokens an int4
weight is rounded to x's dtype. fp8: a token's largest element becomes the largest code, 448.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt4

from pallas_kernels.quantized_pages import LARGEST

#: Tokens from which an int4 weight is written out.
MANY_TOKENS = 256
#: Of the codes 0 … 15; codes less it are exact in bfloat16.
MIDDLE = 7.5


def int8_matmul(
    x: Float[Array, "T K"],
    codes: Int8[Array, "K *out"],
    scale: Float[Array, "*out"],
    precision: jax.lax.Precision,
    sums: str,
) -> Float[Array, "T *out"]:
    """See `api.int8_matmul`."""
    y = jax.lax.dot_general(
        x,
        codes.astype(x.dtype),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.dtype(sums),
    )
    return (y * scale).astype(x.dtype)


def fp8_matmul(
    x: Float[Array, "T K"], codes: Float[Array, "K *out"], scale: Float[Array, "*out"], sums: str
) -> Float[Array, "T *out"]:
    """See `api.fp8_matmul`."""
    wide = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    x_scale = jnp.where(peak > 0, peak / LARGEST[codes.dtype.name], 1.0)
    y = jax.lax.dot_general(
        (wide / x_scale).astype(codes.dtype),
        codes,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.dtype(sums),
    )
    return (y * x_scale.reshape(-1, *(1,) * scale.ndim) * scale).astype(x.dtype)


def int4_matmul(
    x: Float[Array, "T K"],
    codes: UInt4[Array, "K *out"],
    scale: Float[Array, "G *out"],
    minimum: Float[Array, "G *out"],
    precision: jax.lax.Precision,
) -> Float[Array, "T *out"]:
    """See `api.int4_matmul`."""
    num_tokens, depth = x.shape
    num_groups, out_dims = scale.shape[0], codes.shape[1:]
    # Dimensions of the output stay apart: merged, they could no longer lie on several devices.
    code_Gg = codes.reshape(num_groups, -1, *out_dims)
    scale, minimum = scale.astype(jnp.float32), minimum.astype(jnp.float32)
    if num_tokens >= MANY_TOKENS:
        w = code_Gg.astype(jnp.float32) * scale[:, None] + minimum[:, None]
        y = jax.lax.dot_general(
            x,
            w.reshape(depth, *out_dims).astype(x.dtype),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return y.astype(x.dtype)
    # From the middle of the codes, or two large sums would cancel each other.
    middle = minimum + MIDDLE * scale
    x_TGg = x.reshape(num_tokens, num_groups, -1)
    y_GT = jax.lax.dot_general(
        x_TGg,
        code_Gg.astype(x.dtype) - MIDDLE,
        (((2,), (1,)), ((1,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    sums_TG = x_TGg.astype(jnp.float32).sum(-1)
    y = (y_GT * scale[:, None]).sum(0)
    y += jnp.tensordot(sums_TG, middle, 1, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)
