"""The interface of grouped_matmul; every backend computes what `reference.py` says.

Math: rows are sorted by group, group_sizes[g] of them each; with g(t) the group of row t,
y[t, n] = sum over k of x[t, k] w[first_group + g(t), k, n], times scale[g(t), n] where w holds
codes. Rows behind the last group's are zero.

Shapes: x [T, K], w [W, K, N] with W >= E groups, group_sizes [E], scale [E, N], y [T, N]. w may
hold more groups than take part: a stack of layers is given whole, with the layer's first group, so
that no copy of one layer's matrices is ever made.

Traffic: the matrix of each group that has rows, once, and x and y once; see `traffic`. Groups
without rows, and rows behind the last group's, cost no matrix.

Numerics: products accumulated in float32, y in x's dtype. int8 codes are exact in bfloat16.

Limits: no gradient; no int4 codes. "gpu" takes bfloat16 and float16, no codes, K of multiples of 64
and N of 128. On a TPU, N should be a multiple of TPU_LANES: XLA lays smaller
or odd matrices out with K innermost, and copies them into the order that its kernel reads, in
every call or, in a loop, in front of it.
"""

from __future__ import annotations

from importlib import import_module

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: Columns that a TPU handles at a time.
TPU_LANES = 128
BACKENDS = ("xla", "gpu", "reference")


def grouped_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "W K N"] | Int[Array, "W K N"],
    group_sizes: Int[Array, "E"],
    *,
    first_group: int | Int[Array, ""] = 0,
    scale: Float[Array, "E N"] | None = None,
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
    backend: str = "xla",
) -> Float[Array, "T N"]:
    """Each row times the matrix of its group.

    Args:
        w: matrices, or int8 codes with a `scale`.
        group_sizes: rows of each group, in order; their sum is at most T.
        first_group: the first of w's groups that takes part; first_group + E <= W.
        scale: of each column of a group's codes.
        backend: "xla" (any platform), "gpu" (Pallas, for Hopper), or "reference".

    Returns:
        In x's dtype; zeros for rows behind the last group's.

    Raises:
        UnsupportedKernel: the backend cannot run with these arrays.
        ValueError: shapes or dtypes that contradict each other, or an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: grouped_matmul has {', '.join(BACKENDS)}")
    num_groups, columns = group_sizes.shape[0], w.shape[-1]
    if w.ndim != 3 or w.shape[1] != x.shape[1] or w.shape[0] < num_groups:
        raise ValueError(f"x {x.shape}, w {w.shape}, {num_groups} groups")
    if (scale is None) == jnp.issubdtype(w.dtype, jnp.integer):
        raise ValueError(f"w is {w.dtype}: codes need a scale, other matrices take none")
    if scale is not None and (scale.shape != (num_groups, columns) or w.dtype != jnp.int8):
        raise ValueError(f"w {w.dtype} {w.shape}, scale {scale.shape}, {num_groups} groups")
    run = import_module(f"pallas_kernels.grouped_matmul.{backend}").grouped_matmul
    with jax.named_scope("grouped_matmul"):
        return run(x, w, group_sizes, first_group, scale, precision)
