"""The TPU kernel of lora_matmul, interpreted, against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.lora_matmul import LoraWeights, block_tokens, lora_matmul, tpu

SLOTS = ((8, 3), (16, 2))
NONE = -1


@pytest.mark.parametrize(
    ("cycle", "repeats", "depth"),
    [((256,), 1, 128), ((128, 64, 64), 2, 256), ((256, 256), 1, 128)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_the_reference(
    cycle: tuple[int, ...], repeats: int, depth: int, dtype: str
) -> None:
    """Both classes, tokens without adapters, more tokens than a block of one slot."""
    slots = [2, NONE, 0, 4, 2, 2, NONE, 3, 4, 0, 2, 2, 2, 1, NONE, 4, 2, 0, 0]
    rng = np.random.default_rng(0)
    columns = sum(cycle) * repeats

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, y = draw(len(slots), depth), draw(len(slots), columns)
    weights, blocks, first = [], [], 0
    for rank, count in SLOTS:
        weights.append(
            LoraWeights(
                a=draw(2, count, rank * len(cycle), depth) / 8, b=draw(2, count, rank, columns)
            )
        )
        blocks.append(block_tokens(jnp.asarray(slots) - first, count))
        first += count
    high, layer = jax.lax.Precision.HIGHEST, jnp.asarray(1, jnp.int32)
    got = tpu.lora_matmul(
        x, y, tuple(weights), tuple(blocks), layer, cycle, high, None, interpret=True
    )
    expected = lora_matmul(
        x, y, weights, blocks, 1, cycle=cycle, precision=high, backend="reference"
    )
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == "float32" else 0.15
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance, rtol=1e-2
    )
    alone = [t for t, slot in enumerate(slots) if slot == NONE]
    np.testing.assert_array_equal(got[jnp.asarray(alone)], y[jnp.asarray(alone)])


def test_odd_sizes_are_refused() -> None:
    """With the limit."""
    weights = LoraWeights(a=jnp.zeros((1, 2, 8, 96)), b=jnp.zeros((1, 2, 8, 128)))
    blocks = block_tokens(jnp.zeros(4, jnp.int32), 2)
    with pytest.raises(UnsupportedKernel, match="K=96"):
        lora_matmul(jnp.zeros((4, 96)), jnp.zeros((4, 128)), [weights], [blocks], 0, backend="tpu")
