"""Pages of codes: what they hold, how they are written, and attention over them."""

from __future__ import annotations

import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedKernel
from pallas_kernels.kv_update import empty_pages, kv_update
from pallas_kernels.paged_attention import paged_attention, reference
from pallas_kernels.quantized_pages import QuantizedPages, dequantize, quantize, values
from tests.kernels.batches import DECODE, MIXED, Case, relative_error

DTYPES = ("int8", "float8_e4m3fn")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e30])
def test_codes_err_by_half_a_step_at_most(dtype: str, magnitude: float) -> None:
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32) * magnitude
    codes, scale = quantize(jnp.asarray(x), dtype)
    held = np.asarray(values(codes, dtype), np.float64) * np.asarray(scale, np.float64)[:, None]
    peak = np.abs(x).max(1, keepdims=True)
    # int8 has even steps; float8 3 bits of fraction, and even steps below 2**-6.
    step = peak / 127 if dtype == "int8" else np.maximum(np.abs(x) / 8, peak / 448 / 2**9)
    assert (np.abs(held - x) <= 0.51 * step).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype: str) -> None:
    codes, scale = quantize(jnp.zeros((3, 8)), dtype)
    assert not np.asarray(codes).any()
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_widen_the_cache(dtype: str) -> None:
    case = Case(lens=MIXED, dtype=dtype)
    arrays = case.arrays(0)
    arrays["pages"] = jax.eval_shape(lambda: empty_pages((2, 1 << 16, 3, 16, 128), dtype))
    run = jax.jit(lambda a: paged_attention(layer=1, backend="xla", **a, **case.options))
    memory = run.lower(arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 24


def attend(case: Case, arrays: dict[str, Any]) -> jax.Array:
    return jax.jit(lambda a: paged_attention(layer=1, backend="xla", **a, **case.options))(arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens", [DECODE, MIXED, [(0, 0)]])
@pytest.mark.parametrize(("window", "soft_cap", "unused"), [(None, None, 0), (40, 5.0, 32)])
def test_attention_matches_reference(
    dtype: str, lens: Any, window: int | None, soft_cap: float | None, unused: int
) -> None:
    seed = secrets.randbits(32)
    case = Case(
        lens=lens, window=window, soft_cap=soft_cap, dtype=dtype, padding=5, unused=unused,
        unused_value=0.0,
    )  # fmt: skip
    arrays = case.arrays(seed)
    expected = reference.paged_attention(layer=1, **arrays, **case.options)
    out = attend(case, arrays)
    assert np.isfinite(np.asarray(out)).all(), f"seed {seed}"
    assert relative_error(out, expected) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("float8_e4m3fn", 0.1)])
def test_attention_comes_near_that_over_the_values(dtype: str, bound: float) -> None:
    plain, coded = Case(lens=MIXED), Case(lens=MIXED, dtype=dtype)
    change = relative_error(attend(coded, coded.arrays(1)), attend(plain, plain.arrays(1)))
    assert 1e-4 < change < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_writes_codes_and_scales_in_place(dtype: str) -> None:
    rng = np.random.default_rng(2)
    shape = (2, 6, 3, 4, 32)
    k_new, v_new = (jnp.asarray(rng.standard_normal((5, 3, 16)), jnp.float32) for _ in "kv")
    places = jnp.asarray([4, 1, 2, 5, 1]), jnp.asarray([0, 3, 2, 1, 0])
    run = jax.jit(lambda pages, k, v: kv_update(pages, k, v, 1, *places), donate_argnums=0)
    before = jax.tree.map(lambda x: x + 1, empty_pages(shape, dtype))
    after = run(jax.tree.map(jnp.copy, before), k_new, v_new)
    assert isinstance(after, QuantizedPages)
    held = dequantize(after)
    for t, (page, offset) in enumerate(zip(*map(np.asarray, places), strict=True)):
        for new, lanes in ((k_new, slice(16)), (v_new, slice(16, 32))):
            codes, scale = quantize(new[t], dtype)
            expected = values(codes, dtype) * scale[:, None]
            np.testing.assert_array_equal(held[1, page, :, offset, lanes], expected)
    written = np.zeros((2, 6, 4), bool)
    written[1, places[0], places[1]] = True
    for now, then, axes in (
        (after.codes, before.codes, (0, 1, 3, 2, 4)),
        (*(x.scales.reshape(2, 6, 3, 2, 4) for x in (after, before)), (0, 1, 4, 2, 3)),
    ):
        now, then = (np.asarray(x, np.float32).transpose(axes)[~written] for x in (now, then))
        np.testing.assert_array_equal(now, then)
    huge = jax.eval_shape(lambda: empty_pages((2, 1 << 16, 3, 4, 32), dtype))
    memory = run.lower(huge, k_new, v_new).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(huge)
    )
    assert memory.temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_kernel_says_that_it_does_not_read_codes(dtype: str) -> None:
    case = Case(lens=DECODE, dtype=dtype)
    with pytest.raises(UnsupportedKernel, match=f"pages are {dtype}, the kernel takes float32"):
        paged_attention(layer=1, backend="cpu", **case.arrays(0), **case.options)
