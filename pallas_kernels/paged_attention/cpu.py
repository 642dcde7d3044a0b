"""The native paged attention (`cpu.cc`) as a JAX function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import native
from pallas_kernels.ragged import RaggedBatch

DTYPES = ("float32", "float16", "bfloat16")


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run here; None where it can."""
    if head_dim % 16:
        return f"head_dim {head_dim} is no multiple of 16"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"pages are {jnp.dtype(dtype).name}, the kernel takes {', '.join(DTYPES)}"
    return native.load().reason


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Float[Array, "L P K Z W"],
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "T N H"]:
    """See `api.paged_attention`."""
    sinks = jnp.zeros((0,)) if sinks is None else sinks
    with jax.named_scope("paged_attention"):
        out = jax.ffi.ffi_call(
            "jaxserve_paged_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32)
        )(
            q.astype(jnp.float32),
            pages,
            jnp.asarray(layer, jnp.int32),
            batch.page_table.astype(jnp.int32),
            batch.query_starts.astype(jnp.int32),
            batch.context_lens.astype(jnp.int32),
            sinks.astype(jnp.float32),
            scale=np.float32(scale),
            soft_cap=np.float32(soft_cap or 0.0),
            window=np.int64(window or 0),
        )
        return out.astype(q.dtype)
