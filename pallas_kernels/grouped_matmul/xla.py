"""grouped_matmul as XLA lowers it best, which differs by platform.

On a TPU `jax.lax.ragged_dot` becomes a kernel of XLA's own: compiled, it holds no temporaries to
speak of, reads int8 codes as they are, and takes the matrices in place
(`tests/kernels/test_grouped_matmul.py` compiles it and looks). Two things would spoil that, both
copies of all matrices: converting them in front of it, and a stack of layers sliced by a scan. So
codes go in unconverted, and a stack goes in whole, its other layers as groups without rows.

Elsewhere XLA writes `ragged_dot` out as the product of every row with every group's matrix, masked
to [E, T, K]. There a loop over blocks of rows is used instead, which turns as often as there are
blocks with rows:

    group        0 0 0 0 0 2 2 5 5 5 . .      (. is no group's)
    block        └─a───┘ b─ ── c─ ── d─       4 rows each, of one group only; what sticks out
                                              at its end is overwritten by the next block

Each turn slices its group's matrix out of w, multiplies and writes its rows. Blocks have about as
many rows as a group has on average, so that few rows are multiplied in vain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: Rows of a block: more reuse a matrix no better.
_MAX_BLOCK = 64


def grouped_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "W K N"] | Int[Array, "W K N"],
    group_sizes: Int[Array, "E"],
    first_group: int | Int[Array, ""],
    scale: Float[Array, "E N"] | None,
    precision: jax.lax.Precision,
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`."""
    first_group = jnp.asarray(first_group, jnp.int32)

    def on_tpu(*args: Array) -> Float[Array, "T N"]:
        return by_ragged_dot(*args, precision=precision)

    def elsewhere(*args: Array) -> Float[Array, "T N"]:
        return by_blocks(*args, precision=precision)

    y_TN = jax.lax.platform_dependent(x, w, group_sizes, first_group, tpu=on_tpu, default=elsewhere)
    row, ends_E = jnp.arange(x.shape[0]), jnp.cumsum(group_sizes)
    if scale is not None:
        group_T = jnp.sum(ends_E[None, :] <= row[:, None], axis=1)
        y_TN = y_TN * scale.at[group_T].get(mode="clip")
    return jnp.where((row < ends_E[-1])[:, None], y_TN, 0).astype(x.dtype)


def by_ragged_dot(
    x: Float[Array, "T K"],
    w: Float[Array, "W K N"] | Int[Array, "W K N"],
    group_sizes: Int[Array, "E"],
    first_group: Int[Array, ""],
    *,
    precision: jax.lax.Precision,
) -> Float[Array, "T N"]:
    """XLA's own, float32; rows behind the last group's may hold anything."""
    if w.shape[0] > group_sizes.shape[0]:
        whole = jnp.zeros(w.shape[0], group_sizes.dtype)
        group_sizes = jax.lax.dynamic_update_slice(whole, group_sizes, (first_group,))
    return jax.lax.ragged_dot(
        x, w, group_sizes, precision=precision, preferred_element_type=jnp.float32
    )


def by_blocks(
    x: Float[Array, "T K"],
    w: Float[Array, "W K N"] | Int[Array, "W K N"],
    group_sizes: Int[Array, "E"],
    first_group: Int[Array, ""],
    *,
    precision: jax.lax.Precision,
) -> Float[Array, "T N"]:
    """A loop over blocks of rows of one group, float32; rows of no group may hold anything."""
    (num_rows, depth), num_groups = x.shape, group_sizes.shape[0]
    block = block_rows(num_rows, num_groups)
    ends_E = jnp.cumsum(group_sizes)
    blocks_E = -(-group_sizes // block)
    block_ends_E = jnp.cumsum(blocks_E)
    # Of each block, its group and its first row; there are never more than this.
    index_U = jnp.arange(min(num_rows, num_groups + num_rows // block), dtype=jnp.int32)
    group_U = jnp.sum(block_ends_E[None, :] <= index_U[:, None], axis=1)
    group_U = jnp.minimum(group_U, num_groups - 1)
    earlier_U = index_U - (block_ends_E - blocks_E)[group_U]
    first_row_U = (ends_E - group_sizes)[group_U] + earlier_U * block
    # A last block may stick out.
    x = jnp.pad(x, ((0, block), (0, 0)))

    def turn(u: Int[Array, ""], y: Float[Array, "T+b N"]) -> Float[Array, "T+b N"]:
        rows = jax.lax.dynamic_slice(x, (first_row_U[u], 0), (block, depth))
        matrix = jax.lax.dynamic_index_in_dim(w, first_group + group_U[u], keepdims=False)
        part = jnp.dot(
            rows,
            matrix.astype(x.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_slice(y, part, (first_row_U[u], 0))

    y = jnp.zeros((num_rows + block, w.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, block_ends_E[-1], turn, y)[:num_rows]


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: a power of two near the average group's."""
    average = max(1, num_rows // num_groups)
    return min(_MAX_BLOCK, 1 << (average.bit_length() - 1))
