"""Every backend of paged attention against the reference, on fresh random batches."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.paged_attention import BACKENDS, RaggedBatch, paged_attention, reference

TOLERANCE = 1e-5


def _backends() -> list[Any]:
    reason = native.load().reason
    marks = [pytest.mark.skip(reason=f"native kernels: {reason}")] if reason else []
    return [pytest.param(b, marks=marks if b == "cpu" else []) for b in BACKENDS]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass(kw_only=True)
class Case:
    """A random batch; `lens` is (query_len, context_len) a row."""

    lens: list[tuple[int, int]]
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    page_size: int = 16
    padding: int = 0
    window: int | None = None
    soft_cap: float | None = None
    num_layers: int = 2
    max_query_len: int | None = None
    dtype: str = "float32"
    unused: int = 0  # lanes behind each key and each value

    def arrays(self, seed: int) -> dict[str, Any]:
        """Inputs; whatever nobody may look at is NaN."""
        rng = np.random.default_rng(seed)
        page_counts = [-(-c // self.page_size) for _, c in self.lens]
        max_pages = max([*page_counts, 1]) + 2
        num_pages = sum(page_counts) + 3
        shape = (self.num_layers, num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        free = list(rng.permutation(np.arange(1, num_pages)))
        k, v = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        table = np.zeros((len(self.lens), max_pages), np.int32)
        for row, (query_len, context_len) in enumerate(self.lens):
            first_seen = 0 if self.window is None else context_len - query_len + 1 - self.window
            for position in range(max(first_seen, 0), context_len if query_len else 0):
                index, offset = divmod(position, self.page_size)
                if table[row, index] == 0:
                    table[row, index] = free.pop()
                place = (slice(None), table[row, index], slice(None), offset)
                k[place] = rng.standard_normal(k[place].shape)
                v[place] = rng.standard_normal(v[place].shape)
        starts = np.cumsum([0, *(n for n, _ in self.lens)]).astype(np.int32)
        num_tokens = max(int(starts[-1]) + self.padding, 1)
        q = 2 * rng.standard_normal((num_tokens, self.num_heads, self.head_dim), np.float32)
        q[starts[-1] :] = np.nan
        batch = RaggedBatch(
            page_table=jnp.asarray(table),
            query_starts=jnp.asarray(starts),
            context_lens=jnp.asarray([c for _, c in self.lens], jnp.int32),
            max_query_len=self.max_query_len or max([n for n, _ in self.lens] + [1]),
        )
        unused = np.full((*shape[:-1], self.unused), np.nan, np.float32)
        pages = np.concatenate([k, unused, v, unused], axis=-1)
        pages = jnp.asarray(pages).astype(self.dtype)
        return {"q": jnp.asarray(q), "pages": pages, "batch": batch}

    @property
    def options(self) -> dict[str, Any]:
        return {
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "soft_cap": self.soft_cap,
        }


def relative_error(out: Any, expected: Any) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / max(float(np.linalg.norm(expected)), 1e-30))


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


DECODE = [(1, 7), (1, 1), (0, 0), (1, 130), (1, 16), (1, 17), (0, 40), (1, 300)]
MIXED = [(1, 33), (1, 257), (70, 70), (0, 0), (5, 130), (1, 1), (128, 200), (2, 2), (65, 300)]


@pytest.mark.parametrize("lens", [DECODE, MIXED, [(0, 0), (0, 0)], [(200, 200)]])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (40, None), (None, 5.0), (1, 3.0)])
def test_matches_reference(
    backend: str, lens: list[tuple[int, int]], window: int | None, soft_cap: float | None
) -> None:
    check(Case(lens=lens, window=window, soft_cap=soft_cap, padding=5), backend)


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
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    case = Case(lens=[(1, 3)])
    given = {"backend": "xla", "layer": 0, **case.arrays(2), **case.options, **change}
    with pytest.raises(ValueError, match=message):
        paged_attention(**given)
