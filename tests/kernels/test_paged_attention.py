"""The backends that run on any host against the reference, on fresh random batches."""

from __future__ import annotations

import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import RaggedBatch, paged_attention, reference
from tests.kernels.batches import ALIGNED, DECODE, MIXED, Case, relative_error

TOLERANCE = 1e-5


def check(case: Case, backend: str, layer: int = 1) -> None:
    seed = secrets.randbits(32)
    arrays = case.arrays(seed)
    expected = reference.paged_attention(layer=layer, **arrays, **case.options)
    out = jax.jit(lambda a: paged_attention(layer=layer, backend=backend, **a, **case.options))(
        arrays
    )
    live = int(arrays["batch"].query_starts[-1])
    assert out.shape == expected.shape and out.dtype == arrays["q"].dtype
    assert np.isfinite(np.asarray(out)).all(), f"seed {seed}"
    assert not np.asarray(out)[live:].any(), f"seed {seed}: padding is not zero"
    assert relative_error(out, expected) < TOLERANCE, f"seed {seed}"


@pytest.mark.parametrize("lens", [DECODE, MIXED, [(0, 0), (0, 0)], [(200, 200)]])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (40, None), (None, 5.0), (1, 3.0)])
def test_matches_reference(
    backend: str, lens: list[tuple[int, int]], window: int | None, soft_cap: float | None
) -> None:
    check(Case(lens=lens, window=window, soft_cap=soft_cap, padding=5), backend)


@pytest.mark.parametrize("window", [None, 40])
def test_decode_as_programs_have_it(backend: str, window: int | None) -> None:
    check(Case(lens=ALIGNED, window=window, padding=2, aligned=True), backend)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 1), (9, 3), (14, 2)])
def test_heads(backend: str, head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    case = Case(
        lens=[(1, 40), (19, 50), (1, 3)],
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )
    check(case, backend)


@pytest.mark.parametrize("lens", [DECODE, MIXED])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (40, 5.0)])
def test_sinks(
    backend: str, lens: list[tuple[int, int]], window: int | None, soft_cap: float | None
) -> None:
    lens = [*lens, (1, 3000)]  # the native kernel splits it
    case = Case(lens=lens, window=window, soft_cap=soft_cap, sinks=True, padding=3)
    check(case, backend)
    arrays = case.arrays(0)
    without = {name: array for name, array in arrays.items() if name != "sinks"}
    options = {"layer": 1, "backend": backend, **case.options}
    out, plain = paged_attention(**arrays, **options), paged_attention(**without, **options)
    assert relative_error(out, plain) > 0.1, "sinks change nothing"


def test_rows_wider_than_key_and_value(backend: str) -> None:
    check(Case(lens=MIXED, head_dim=80, num_heads=4, num_kv_heads=2, unused=48), backend)


@pytest.mark.parametrize("page_size", [1, 8, 32, 256])
def test_page_sizes(backend: str, page_size: int) -> None:
    check(Case(lens=MIXED, page_size=page_size, window=50), backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_pages(backend: str, dtype: str) -> None:
    """The pages' values are exact in float32, so the tolerance stays."""
    check(Case(lens=MIXED, dtype=dtype, padding=3), backend)
    check(Case(lens=DECODE, dtype=dtype), backend)


@pytest.mark.parametrize("window", [None, 100])
def test_contexts_beyond_int16(backend: str, window: int | None) -> None:
    case = Case(
        lens=[(1, 70_001), (3, 40_000)],
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        num_layers=1,
        window=window,
    )
    check(case, backend, layer=0)


def test_one_program_serves_other_lengths(backend: str) -> None:
    """Lengths are data: nothing of the first batch is baked in."""
    case = Case(lens=[(1, 200), (40, 90), (0, 0)])
    fn = jax.jit(lambda a: paged_attention(layer=0, backend=backend, **a, **case.options))
    arrays = case.arrays(0)
    fn(arrays)
    batch = RaggedBatch(
        page_table=arrays["batch"].page_table,
        query_starts=jnp.asarray([0, 30, 31, 31], jnp.int32),
        context_lens=jnp.asarray([100, 20, 0], jnp.int32),
        max_query_len=40,
    )
    arrays["q"] = jnp.nan_to_num(arrays["q"])
    arrays["batch"] = batch
    expected = reference.paged_attention(layer=0, **arrays, **case.options)
    assert relative_error(fn(arrays), expected) < TOLERANCE


def test_scanned_layers_equal_unrolled(backend: str) -> None:
    case = Case(lens=MIXED, num_layers=3)
    arrays = case.arrays(1)

    def attend(layer: Any) -> jax.Array:
        return paged_attention(layer=layer, backend=backend, **arrays, **case.options)

    unrolled = np.stack([jax.jit(attend, static_argnums=0)(layer) for layer in range(3)])
    _, scanned = jax.jit(lambda: jax.lax.scan(lambda c, i: (c, attend(i)), 0, jnp.arange(3)))()
    assert relative_error(scanned, unrolled) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"window": 0}, "window=0"),
        ({"q": jnp.zeros((4, 8, 64))}, "8 query heads"),
        ({"q": jnp.zeros((4, 9, 96))}, "differ"),
        ({"sinks": jnp.zeros(3)}, "sinks"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    case = Case(lens=[(1, 3)])
    given = {"backend": "xla", "layer": 0, **case.arrays(2), **case.options, **change}
    with pytest.raises(ValueError, match=message):
        paged_attention(**given)
