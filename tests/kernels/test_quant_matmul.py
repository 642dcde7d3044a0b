"""Products with dense codes against the weight that the codes stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quant_matmul import fp8_matmul, int4_matmul, int8_matmul, reference, traffic


def error(out: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("out_dims", [(5,), (3, 4, 2)])
def test_matches_reference(dtype, bound: float, num_tokens: int, out_dims) -> None:
    rng = np.random.default_rng(num_tokens)
    x = jnp.asarray(rng.standard_normal((num_tokens, 96)), dtype)
    highest = jax.lax.Precision.HIGHEST
    codes = rng.integers(-127, 128, (96, *out_dims), np.int8)
    scale = rng.random(out_dims, np.float32)
    expected = reference.matmul(np.asarray(x), reference.int8_weight(codes, scale))
    out = int8_matmul(x, jnp.asarray(codes), jnp.asarray(scale), highest)
    assert out.dtype == dtype and out.shape == (num_tokens, *out_dims)
    assert error(out, expected) < bound
    codes = rng.integers(0, 16, (96, *out_dims)).astype(ml_dtypes.uint4)
    scale = rng.random((3, *out_dims)).astype(ml_dtypes.bfloat16)
    minimum = rng.standard_normal((3, *out_dims)).astype(ml_dtypes.bfloat16)
    expected = reference.matmul(np.asarray(x), reference.int4_weight(codes, scale, minimum))
    out = int4_matmul(x, *map(jnp.asarray, (codes, scale, minimum)), highest)
    assert out.dtype == dtype and out.shape == (num_tokens, *out_dims)
    assert error(out, expected) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("num_tokens", [1, 70])
@pytest.mark.parametrize("out_dims", [(5,), (3, 4, 2)])
def test_fp8_matches_reference(dtype, bound: float, num_tokens: int, out_dims) -> None:
    rng = np.random.default_rng(num_tokens)
    x = jnp.asarray(100 * rng.standard_normal((num_tokens, 96)), dtype)
    codes = (40 * rng.standard_normal((96, *out_dims))).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random(out_dims, np.float32)
    weight = codes.astype(np.float64) * scale
    rounded = reference.fp8_rounded(np.asarray(x, np.float32))
    out = fp8_matmul(x, jnp.asarray(codes), jnp.asarray(scale))
    assert out.dtype == dtype and out.shape == (num_tokens, *out_dims)
    assert error(out, reference.matmul(rounded, weight)) < bound
    assert 0.005 < error(out, reference.matmul(np.asarray(x), weight)) < 0.06
    assert not fp8_matmul(0 * x, jnp.asarray(codes), jnp.asarray(scale)).any()


def test_sums_that_devices_exchange_are_rounded_once_more() -> None:
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((70, 96)), jnp.bfloat16)
    codes, scale = rng.integers(-127, 128, (96, 7), np.int8), rng.random(7, np.float32)
    weight = reference.int8_weight(codes, scale)
    wide, narrow = (
        int8_matmul(x, jnp.asarray(codes), jnp.asarray(scale), sums=sums)
        for sums in ("float32", "bfloat16")
    )
    assert not np.array_equal(wide, narrow)
    assert error(narrow, reference.matmul(np.asarray(x), weight)) < 1e-2


def test_contradictions_are_refused() -> None:
    x, codes = jnp.zeros((1, 64)), jnp.zeros((64, 3), jnp.int8)
    with pytest.raises(ValueError, match=r"\(64, 3\).*\(4,\)"):
        int8_matmul(x, codes, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"\(64, 3\).*\(4,\)"):
        fp8_matmul(x, codes.astype(jnp.float8_e4m3fn), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"\(64, 3\).*\(1, 3\)"):
        int4_matmul(x, codes, jnp.zeros((1, 3)), jnp.zeros((2, 3)))


def test_bytes_are_those_of_the_arrays() -> None:
    assert traffic.int8_bytes(64, 10) == 64 * 10 + 10 * 4
    assert traffic.int4_bytes(64, 10) == 64 * 10 // 2 + 2 * 2 * 10 * 2
