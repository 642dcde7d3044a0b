"""The native packed matmul (`cpu.cc`) as a JAX function."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import native


def unsupported() -> str | None:
    """Why the native library is not there; None where it is."""
    return native.load().reason


def packed_matmul(
    x: Float[Array, "M K"],
    packed: Sequence[Shaped[Array, "L J _ 24"]],
    num_columns: int,
    num_rows: Int[Array, ""] | None,
    layer: int | Int[Array, ""],
) -> Float[Array, "M N"]:
    """See `api.packed_matmul`; `packed` has one array, or those of `CodePanels`."""
    live = jnp.asarray(x.shape[0] if num_rows is None else num_rows, jnp.int32)
    out = jax.ShapeDtypeStruct((x.shape[0], num_columns), jnp.float32)
    with jax.named_scope("packed_matmul"):
        kind = "jaxserve_packed_matmul" + ("", "_int8", "_int4")[len(packed) - 1]
        return jax.ffi.ffi_call(kind, out)(x, *packed, jnp.asarray(layer, jnp.int32), live)
