"""Every backend of kv_update against the reference, and that it works in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedKernel
from pallas_kernels.kv_update import kv_update, page_width, reference

L, P, K, Z, H, T = 3, 9, 2, 4, 16, 11


def arrays(dtype: str, unused: int = 0) -> tuple[np.ndarray, ...]:
    """Pages, keys, values, and the tokens' places."""
    rng = np.random.default_rng(0)
    shape = (L, P, K, Z, 2 * (H + unused))
    pages = np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))
    new = [rng.standard_normal((T, K, H)).astype(np.float32) for _ in "kv"]
    places = rng.permutation(np.arange(Z, P * Z))[:T]
    token_pages = (places // Z).astype(np.int32)
    token_pages[-2:] = 0  # padding
    return pages, *new, token_pages, (places % Z).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("layer", "unused"), [(0, 0), (2, 0), (1, 8)])
def test_matches_reference(backend: str, dtype: str, layer: int, unused: int) -> None:
    pages, k_new, v_new, token_pages, offsets = arrays(dtype, unused)
    want = reference.kv_update(pages, k_new, v_new, layer, token_pages, offsets)
    got = jax.jit(lambda *a: kv_update(*a[:3], layer, *a[3:], backend=backend), donate_argnums=0)(
        *map(jnp.asarray, (pages, k_new, v_new, token_pages, offsets))
    )
    assert got.dtype == dtype
    for ours, theirs in zip(
        np.split(np.asarray(got), 2, axis=-1), np.split(want, 2, axis=-1), strict=True
    ):
        np.testing.assert_array_equal(ours[:, 1:, ..., :H], theirs[:, 1:, ..., :H])


def test_a_traced_layer_is_the_same(backend: str) -> None:
    pages, k_new, v_new, token_pages, offsets = map(jnp.asarray, arrays("float32"))

    def all_layers(pages: Any) -> Any:
        def one(layer: Any, pages: Any) -> Any:
            return kv_update(pages, k_new, v_new, layer, token_pages, offsets, backend=backend)

        return jax.lax.fori_loop(0, L, one, pages)

    got = jax.jit(all_layers)(pages)
    for layer in range(L):
        want = kv_update(pages, k_new, v_new, layer, token_pages, offsets, backend=backend)
        np.testing.assert_array_equal(got[layer, 1:], np.asarray(want)[layer, 1:])


def test_donated_pages_are_not_copied(backend: str) -> None:
    shape = jax.ShapeDtypeStruct((L, 4096, K, Z, 2 * H), jnp.float32)
    new = jax.ShapeDtypeStruct((T, K, H), jnp.float32)
    places = jax.ShapeDtypeStruct((T,), jnp.int32)
    compiled = (
        jax.jit(lambda *a: kv_update(*a[:3], 1, *a[3:], backend=backend), donate_argnums=0)
        .lower(shape, new, new, places, places)
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 100_000 < shape.size * 4
    assert memory.alias_size_in_bytes == shape.size * 4


def test_contradictions_are_refused() -> None:
    pages, new = jnp.zeros((L, P, K, Z, 2 * H)), jnp.zeros((T, K, H))
    places = jnp.zeros(T, jnp.int32)
    with pytest.raises(ValueError, match="differ"):
        kv_update(pages, new[:, :1], new, 0, places, places)
    with pytest.raises(ValueError, match="differ"):
        kv_update(pages[..., :H], new, new, 0, places, places)
    with pytest.raises(ValueError, match="backend='cuda'"):
        kv_update(pages, new, new, 0, places, places, backend="cuda")
    with pytest.raises(UnsupportedKernel, match="int8"):
        kv_update(pages.astype(jnp.int8), new, new, 0, places, places, backend="cpu")


def test_rows_fill_whole_registers_on_a_tpu() -> None:
    assert [page_width(head_dim, "tpu") for head_dim in (64, 80, 96, 128, 256)] == [
        128, 256, 256, 256, 512,
    ]  # fmt: skip
    assert page_width(80, "cpu") == page_width(80, "xla") == 160
