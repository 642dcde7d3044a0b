"""The native kv_update (`cpu.cc`) as a JAX function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import native

DTYPES = ("float32", "float16", "bfloat16")


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run here; None where it can."""
    if head_dim % 8:
        return f"head_dim {head_dim} is no multiple of 8"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"pages are {jnp.dtype(dtype).name}, the kernel takes {', '.join(DTYPES)}"
    return native.load().reason


def kv_update(
    pages: Float[Array, "L P K Z W"],
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
    num_rows: int | None = None,
) -> Float[Array, "L P K Z W"]:
    """See `api.kv_update`."""
    with jax.named_scope("kv_update"):
        return jax.ffi.ffi_call(
            "jaxserve_kv_update",
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
            input_output_aliases={5: 0},
        )(
            k_new.astype(jnp.float32),
            v_new.astype(jnp.float32),
            jnp.asarray(layer, jnp.int32),
            token_pages.astype(jnp.int32),
            token_offsets.astype(jnp.int32),
            pages,
        )


def empty_pages(shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "L P K Z W"]:
    """Allocated by XLA, and left as they are."""
    return jax.ffi.ffi_call("jaxserve_leave", jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))()
