"""Every backend of kv_update against the reference, and that it works in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedKernel, native
from pallas_kernels.kv_update import kv_update, reference
from pallas_kernels.kv_update.api import BACKENDS

L, P, K, Z, H, T = 3, 9, 2, 4, 16, 11


def _backends() -> list[Any]:
    reason = native.load().reason
    marks = [pytest.mark.skip(reason=f"native kernels: {reason}")] if reason else []
    return [pytest.param(b, marks=marks if b == "cpu" else []) for b in BACKENDS]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def arrays(dtype: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    pages = [np.asarray(jnp.asarray(rng.standard_normal((L, P, K, Z, H)), dtype)) for _ in "kv"]
    new = [rng.standard_normal((T, K, H)).astype(np.float32) for _ in "kv"]
    places = rng.permutation(np.arange(Z, P * Z))[:T]
    token_pages = (places // Z).astype(np.int32)
    token_pages[-2:] = 0  # padding
    return *pages, *new, token_pages, (places % Z).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layer", [0, 2])
def test_matches_reference(backend: str, dtype: str, layer: int) -> None:
    k, v, k_new, v_new, pages, offsets = arrays(dtype)
    expected = reference.kv_update(k, v, k_new, v_new, layer, pages, offsets)
    out = jax.jit(
        lambda *a: kv_update(*a[:4], layer, *a[4:], backend=backend), donate_argnums=(0, 1)
    )(*map(jnp.asarray, (k, v, k_new, v_new, pages, offsets)))
    for got, want in zip(out, expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got)[:, 1:], want[:, 1:])


def test_a_traced_layer_is_the_same(backend: str) -> None:
    k, v, k_new, v_new, pages, offsets = map(jnp.asarray, arrays("float32"))

    def all_layers(k: Any, v: Any) -> Any:
        def one(layer: Any, cache: Any) -> Any:
            return kv_update(*cache, k_new, v_new, layer, pages, offsets, backend=backend)

        return jax.lax.fori_loop(0, L, one, (k, v))

    out_k, out_v = jax.jit(all_layers)(k, v)
    for layer in range(L):
        want_k, want_v = kv_update(k, v, k_new, v_new, layer, pages, offsets, backend=backend)
        np.testing.assert_array_equal(out_k[layer, 1:], want_k[layer, 1:])
        np.testing.assert_array_equal(out_v[layer, 1:], want_v[layer, 1:])


def test_donated_pages_are_not_copied(backend: str) -> None:
    shape = jax.ShapeDtypeStruct((L, 4096, K, Z, H), jnp.float32)
    new = jax.ShapeDtypeStruct((T, K, H), jnp.float32)
    places = jax.ShapeDtypeStruct((T,), jnp.int32)
    compiled = (
        jax.jit(lambda *a: kv_update(*a[:4], 1, *a[4:], backend=backend), donate_argnums=(0, 1))
        .lower(shape, shape, new, new, places, places)
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 100_000 < shape.size * 4
    assert memory.alias_size_in_bytes == 2 * shape.size * 4


def test_contradictions_are_refused() -> None:
    pages, new = jnp.zeros((L, P, K, Z, H)), jnp.zeros((T, K, H))
    places = jnp.zeros(T, jnp.int32)
    with pytest.raises(ValueError, match="differ"):
        kv_update(pages, pages, new[:, :1], new, 0, places, places)
    with pytest.raises(ValueError, match="backend='tpu'"):
        kv_update(pages, pages, new, new, 0, places, places, backend="tpu")
    with pytest.raises(UnsupportedKernel, match="int8"):
        kv_update(
            pages.astype(jnp.int8), pages.astype(jnp.int8), new, new, 0, places, places,
            backend="cpu",
        )  # fmt: skip
