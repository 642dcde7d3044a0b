"""The native segment attention (`cpu.cc`) as a JAX function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import native


def unsupported(*, head_dim: int) -> str | None:
    """Why it cannot run here; None where it can."""
    if head_dim % 16:
        return f"head_dim {head_dim} is no multiple of 16"
    return native.load().reason


def segment_attention(
    qkv: Float[Array, "T 3 N H"], starts: Int[Array, "R+1"], *, scale: float, max_len: int
) -> Float[Array, "T N H"]:
    """See `api.segment_attention`; rows may have any length."""
    shape = (qkv.shape[0], *qkv.shape[2:])
    with jax.named_scope("segment_attention"):
        out = jax.ffi.ffi_call(
            "jaxserve_segment_attention", jax.ShapeDtypeStruct(shape, jnp.float32)
        )(qkv.astype(jnp.float32), starts.astype(jnp.int32), scale=np.float32(scale))
        return out.astype(qkv.dtype)
