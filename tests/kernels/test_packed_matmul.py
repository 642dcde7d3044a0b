"""The native packed matmul against its reference, and the layout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.packed_matmul import (
    CodePanels,
    pack,
    pack_groups,
    pack_int4,
    packed_matmul,
    packed_rows,
    reference,
)

needs_native = pytest.mark.skipif(
    native.load().reason is not None, reason=f"native kernels: {native.load().reason}"
)


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def weight(
    rng: np.random.Generator, dtype: Any, depth: int, num_columns: int
) -> tuple[Any, np.ndarray]:
    """A packed weight, and what it stands for [K, N] in float64."""
    if dtype == np.int8:
        codes = rng.integers(-127, 128, (depth, num_columns), np.int8)
        scale = random(rng, 1, num_columns)
        packed = CodePanels(pack(codes, np.int8), pack_groups(scale))
        return packed, codes * scale.astype(np.float64)
    if dtype == "int4":
        codes = rng.integers(0, 16, (depth, num_columns), np.uint8)
        groups = (depth // 32, num_columns)
        scale, minimum = (random(rng, *groups).astype(jnp.bfloat16) for _ in range(2))
        packed = CodePanels(pack_int4(codes), pack_groups(scale), pack_groups(minimum))
        lowest = np.repeat(minimum.astype(np.float64), 32, 0)
        return packed, codes * np.repeat(scale.astype(np.float64), 32, 0) + lowest
    packed = pack(random(rng, depth, num_columns), dtype)
    return packed, reference.unpack(packed, num_columns).astype(np.float64)


@pytest.mark.parametrize("num_columns", [1, 23, 24, 25, 96, 100])
def test_packing_is_undone_by_the_reference(num_columns: int) -> None:
    w = random(np.random.default_rng(0), 7, num_columns)
    packed = pack(w, np.float32)
    assert packed.shape == (-(-num_columns // 24), 7, 24)
    np.testing.assert_array_equal(reference.unpack(packed, num_columns), w)
    assert not packed[-1, :, 1 + (num_columns - 1) % 24 :].any()


def test_rows_of_the_table_come_back() -> None:
    table = random(np.random.default_rng(1), 50, 8)
    packed = jnp.asarray(pack(table.T, np.float32))
    rows = packed_rows(packed, jnp.asarray([0, 23, 24, 49, 7]))
    np.testing.assert_array_equal(rows, table[[0, 23, 24, 49, 7]])


@needs_native
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 15, 16, 17, 127, 128, 129, 300])
@pytest.mark.parametrize(("depth", "num_columns"), [(1, 1), (64, 24), (300, 100), (577, 49)])
def test_matches_reference(dtype: Any, num_rows: int, depth: int, num_columns: int) -> None:
    rng = np.random.default_rng(num_rows * depth)
    x, (packed, w_KN) = random(rng, num_rows, depth), weight(rng, dtype, depth, num_columns)
    out = jax.jit(packed_matmul, static_argnums=2)(x, packed, num_columns)
    tolerance = 1e-5 * np.abs(w_KN).max() * np.sqrt(depth)
    np.testing.assert_allclose(out, x @ w_KN, rtol=2e-5, atol=tolerance)


@needs_native
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 129])
@pytest.mark.parametrize(("depth", "num_columns"), [(32, 1), (64, 24), (288, 100), (608, 49)])
def test_4_bit_codes_match_the_weight_they_stand_for(
    num_rows: int, depth: int, num_columns: int
) -> None:
    rng = np.random.default_rng(num_rows * depth)
    x, (packed, w_KN) = random(rng, num_rows, depth), weight(rng, "int4", depth, num_columns)
    out = jax.jit(packed_matmul, static_argnums=2)(x, packed, num_columns)
    tolerance = 1e-5 * np.abs(w_KN).max() * np.sqrt(depth)
    np.testing.assert_allclose(out, x @ w_KN, rtol=2e-5, atol=tolerance)


@needs_native
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, "int4"])
def test_a_layer_of_a_stack_is_that_layer(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    x = random(rng, 5, 64)
    layers = [weight(rng, dtype, 64, 50)[0] for _ in range(3)]
    stack = jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *layers)
    run = jax.jit(packed_matmul, static_argnums=2)
    for layer, alone in enumerate(layers):
        together = run(x, stack, 50, None, jnp.int32(layer))
        np.testing.assert_array_equal(together, run(x, alone, 50))

    def body(carry: Any, layer: Any) -> Any:
        return carry, packed_matmul(x, stack, 50, None, layer)

    compiled = jax.jit(lambda: jax.lax.scan(body, 0, jnp.arange(3))[1]).lower().compile()
    np.testing.assert_array_equal(compiled()[1], run(x, layers[1], 50))
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 24  # nothing was copied


@needs_native
@pytest.mark.parametrize("live", [0, 1, 5, 20])
def test_dead_rows_are_zero_and_never_read(live: int) -> None:
    rng = np.random.default_rng(2)
    x, packed = random(rng, 20, 32), pack(random(rng, 32, 30), np.float32)
    x[live:] = np.nan
    out = np.asarray(packed_matmul(jnp.asarray(x), jnp.asarray(packed), 30, jnp.int32(live)))
    assert not out[live:].any()
    np.testing.assert_allclose(
        out, reference.packed_matmul(x, packed, 30, live), rtol=1e-5, atol=1e-5
    )


@needs_native
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, "int4"])
def test_a_row_has_the_same_bits_in_any_company(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    x, packed = random(rng, 300, 608), jax.tree.map(jnp.asarray, weight(rng, dtype, 608, 50)[0])
    together = np.asarray(packed_matmul(jnp.asarray(x), packed, 50))
    for row in (0, 1, 3, 15, 16, 127, 128, 299):
        alone = packed_matmul(jnp.asarray(x[row : row + 1]), packed, 50)
        np.testing.assert_array_equal(alone[0], together[row])
    few = packed_matmul(jnp.asarray(x[:9]), packed, 50)
    np.testing.assert_array_equal(few, together[:9])


def test_contradictions_are_refused() -> None:
    packed = jnp.zeros((2, 8, 24))
    with pytest.raises(ValueError, match="do not give 10 columns"):
        packed_matmul(jnp.zeros((1, 8)), packed, 10)
    with pytest.raises(ValueError, match="do not give 40 columns"):
        packed_matmul(jnp.zeros((1, 9)), packed, 40)
    for stack, layer in ((packed[None], None), (packed, 0)):
        with pytest.raises(ValueError, match="a stack needs a layer"):
            packed_matmul(jnp.zeros((1, 8)), stack, 40, None, layer)
    with pytest.raises(ValueError, match="bfloat16"):
        packed_matmul(jnp.zeros((1, 8), jnp.bfloat16), packed, 40)
    with pytest.raises(ValueError, match="cannot pack as float64"):
        pack(np.zeros((2, 2), np.float32), np.float64)
    with pytest.raises(ValueError, match="groups of 32"):
        pack_int4(np.zeros((48, 2), np.uint8))
    with pytest.raises(ValueError, match="range of float16"):
        pack(np.full((2, 2), 1e6, np.float32), np.float16)
