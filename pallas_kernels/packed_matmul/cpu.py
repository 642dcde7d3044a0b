"""The native packed matmul (`cpu.cc`) as a JAX function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import native


def unsupported() -> str | None:
    """Why the native library is not there; None where it is."""
    return native.load().reason


def packed_matmul(
    x: Float[Array, "M K"],
    packed: Float[Array, "L J K 24"],
    num_columns: int,
    num_rows: Int[Array, ""] | None,
    layer: int | Int[Array, ""],
) -> Float[Array, "M N"]:
    """See `api.packed_matmul`."""
    live = jnp.asarray(x.shape[0] if num_rows is None else num_rows, jnp.int32)
    out = jax.ShapeDtypeStruct((x.shape[0], num_columns), jnp.float32)
    with jax.named_scope("packed_matmul"):
        call = jax.ffi.ffi_call("jaxserve_packed_matmul", out)
        return call(x, packed, jnp.asarray(layer, jnp.int32), live)
