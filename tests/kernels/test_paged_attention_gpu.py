"""The Hopper kernels against the reference, interpreted on the host.

`InterpretGPUParams` runs every warpgroup as a thread; a copy's data is there once its barrier says
so, and memory that nobody wrote is NaN.
"""

from __future__ import annotations

import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import UnsupportedKernel
from pallas_kernels.paged_attention import gpu, gpu_block, gpu_decode, gpu_merge, reference
from pallas_kernels.paged_attention.gpu_chunks import TILE, tiles
from pallas_kernels.paged_attention.gpu_decode import num_splits
from pallas_kernels.ragged import RaggedBatch
from tests.kernels.aligned_copies import aligned_copies
from tests.kernels.batches import ALIGNED, Case, relative_error

TOLERANCE = 1e-2
DECODE = [(1, 7), (1, 300), (0, 40), (1, 64)]
MIXED = [(1, 33), (19, 50), (0, 0), (150, 170), (1, 130), (2, 2)]


def attend(case: Case) -> tuple[jax.Array, jax.Array]:
    """The kernel's output and the reference's, from the same bfloat16 queries."""
    arrays = case.arrays(secrets.randbits(32))
    arrays["q"] = arrays["q"].astype(jnp.bfloat16)
    exact = {**arrays, "q": arrays["q"].astype(jnp.float32)}
    expected = reference.paged_attention(layer=1, **exact, **case.options)
    interpret = plgpu.InterpretGPUParams()
    return gpu.paged_attention(layer=1, **arrays, **case.options, interpret=interpret), expected


def check(case: Case) -> None:
    out, expected = attend(case)
    live = sum(query_len for query_len, _ in case.lens)
    out = np.asarray(out, np.float32)
    assert out.shape == expected.shape
    assert np.isfinite(out[:live]).all()
    assert not out[live:].any(), "padding is not zero"
    assert relative_error(out[:live], expected[:live]) < TOLERANCE


def narrow(head_dim: int, num_heads: int, num_kv_heads: int, **options: Any) -> Case:
    return Case(
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **{"dtype": "bfloat16", **options},
    )


def test_decode() -> None:
    check(narrow(64, 4, 2, lens=DECODE, padding=2))


def test_decode_as_programs_have_it() -> None:
    check(narrow(64, 4, 2, lens=ALIGNED, padding=2, aligned=True))


@pytest.mark.parametrize(
    ("head_dim", "splits", "sinks"),
    [(64, 3, True), pytest.param(256, 2, False, marks=pytest.mark.slow)],
)
def test_decode_of_contexts_that_are_split(
    head_dim: int, splits: int, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_decode, "num_splits", lambda *_: splits)
    check(narrow(head_dim, 4, 2, lens=ALIGNED, padding=2, aligned=True, sinks=sinks))


@pytest.mark.parametrize(
    ("head_dim", "splits", "options"),
    [
        (64, 1, {}),
        (64, 3, {"window": 40, "soft_cap": 5.0, "sinks": True}),
        pytest.param(80, 1, {"page_size": 128}, marks=pytest.mark.slow),
        pytest.param(256, 2, {}, marks=pytest.mark.slow),
    ],
)
def test_decode_writes_the_new_keys_and_values(
    head_dim: int, splits: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page as `kv_update` would have written them, and nothing else; and attended to."""
    monkeypatch.setattr(gpu_decode, "num_splits", lambda *_: splits)
    lens = [(1, 7), (1, 300), (1, 64), (1, 129), (0, 0), (0, 40)]
    case = narrow(head_dim, 4, 2, lens=lens, padding=2, aligned=True, **options)
    arrays = case.arrays(secrets.randbits(32))
    arrays["q"] = arrays["q"].astype(jnp.bfloat16)
    batch, page_size = arrays["batch"], case.page_size
    assert gpu.writes(batch, arrays["pages"], 4)
    where = (1, *batch.token_places(len(lens), page_size))
    page, offset = (np.asarray(part)[:4] for part in where[1:])
    held = np.asarray(arrays["pages"], np.float32)
    new = held[1, page, :, offset].astype(jnp.bfloat16)
    before = held.copy()
    before[1, page, :, offset] = np.nan
    interpret = plgpu.InterpretGPUParams()
    k_new, v_new = (
        jnp.pad(half, ((0, 2), (0, 0), (0, 0)), constant_values=np.nan)
        for half in np.split(new, 2, axis=-1)
    )
    given = {name: array for name, array in arrays.items() if name not in ("q", "pages")}
    out, pages = gpu.write_and_attend(
        arrays["q"], k_new, v_new, jnp.asarray(before, jnp.bfloat16), 1,
        **given, **case.options, interpret=interpret,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(pages, np.float32), held)
    exact = {**arrays, "q": arrays["q"].astype(jnp.float32)}
    expected = reference.paged_attention(layer=1, **exact, **case.options)
    out = np.asarray(out, np.float32)
    assert not out[4:].any() and relative_error(out[:4], expected[:4]) < TOLERANCE


@pytest.mark.slow
def test_more_parts_than_one_expression_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "num_splits", lambda *_: 3)
    monkeypatch.setattr(gpu_merge, "UNROLLED_PARTS", 2)
    check(narrow(64, 2, 1, lens=[(1, 300)]))


@pytest.mark.slow
def test_decode_with_window_cap_and_sinks() -> None:
    check(narrow(128, 3, 1, lens=DECODE, window=40, soft_cap=5.0, sinks=True))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_decode_of_codes(dtype: str) -> None:
    check(narrow(64, 4, 2, lens=DECODE, padding=2, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [8, 128])
def test_decode_of_codes_with_window_cap_and_sinks(page_size: int) -> None:
    case = narrow(
        128, 3, 1, lens=DECODE, window=40, soft_cap=5.0, sinks=True, dtype="int8",
        page_size=page_size,
    )  # fmt: skip
    check(case)


@pytest.mark.parametrize(("dtype", "window"), [("int8", None), ("float8_e4m3fn", 70)])
def test_chunks_of_codes(dtype: str, window: int | None) -> None:
    lens = [(150, 300), (1, 200), (3, 3)]
    check(narrow(64, 2, 1, lens=lens, window=window, soft_cap=5.0, padding=5, dtype=dtype))


@pytest.mark.slow
def test_mixed() -> None:
    check(narrow(64, 4, 2, lens=MIXED, padding=5))


def test_chunks_with_window_cap_and_sinks() -> None:
    lens = [(150, 300), (1, 200)]
    check(narrow(128, 2, 1, lens=lens, window=70, soft_cap=5.0, sinks=True, padding=5))


@pytest.mark.parametrize("query_len", [1, 20])
def test_a_row_alone(query_len: int) -> None:
    check(narrow(64, 4, 2, lens=[(query_len, 70)], padding=3, max_query_len=20))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [80, 96, 192, 256])
def test_heads(head_dim: int) -> None:
    check(narrow(head_dim, 2, 1, lens=[(70, 200), (1, 200)], window=90))


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(80, "bfloat16"), (96, "bfloat16"), (16, "bfloat16"), (64, "int8")]
)
def test_copies_begin_where_the_hardware_copies(
    head_dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned_copies(monkeypatch)
    check(narrow(head_dim, 2, 1, lens=[(71, 90), (1, 20)], dtype=dtype, padding=3))


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [8, 128])
def test_page_sizes(page_size: int) -> None:
    check(narrow(64, 2, 1, lens=[(70, 200), (1, 200)], page_size=page_size))


@pytest.mark.slow
def test_more_query_heads_than_a_product_has_rows() -> None:
    check(narrow(64, 71, 1, lens=[(1, 70), (1, 3)]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # products of what is not there
@pytest.mark.parametrize("lens", [[(1, 300)], [(70, 100)]])
def test_a_missing_wait_is_seen(
    lens: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation is worth something: without the waits for pages the result is wrong."""
    case = narrow(64, 2, 1, lens=lens)
    check(case)
    monkeypatch.setattr(gpu_block, "await_pages", lambda ready, slot: None)

    def is_wrong() -> bool:
        out, expected = attend(case)
        return not relative_error(out.astype(jnp.float32), expected) < TOLERANCE

    assert any(is_wrong() for _ in range(10))  # now and then every page comes in time all the same


def test_every_token_is_in_one_tile() -> None:
    lens = [(1, 9), (300, 400), (0, 0), (128, 128), (2, 70), (1, 1)]
    starts = np.cumsum([0, *(n for n, _ in lens)])
    num_tokens = int(starts[-1]) + 200
    batch = RaggedBatch(
        page_table=jnp.zeros((len(lens), 4), jnp.int32),
        query_starts=jnp.asarray(starts, jnp.int32),
        context_lens=jnp.asarray([c for _, c in lens], jnp.int32),
        max_query_len=300,
    )
    found = tiles(batch, num_tokens, window=50, least=2)
    holders = np.zeros(num_tokens, int)
    for row, token, count, position, begin, end in zip(*map(np.asarray, found), strict=True):
        assert 0 <= count <= TILE
        holders[token : token + count] += 1
        if token >= starts[-1]:
            assert end == 0, "padding sees nothing"
        elif count:
            query_len, context_len = lens[row]
            assert starts[row] <= token < starts[row + 1]
            assert position == context_len - query_len + token - starts[row]
            assert (begin, end) == (max(position - 49, 0), position + count)
    several = np.concatenate([np.full(n, n > 1) for n, _ in lens] + [np.full(200, True)])
    assert (holders == several).all()


@pytest.mark.parametrize(
    ("num_blocks", "max_pages", "splits"),
    [(64 * 8, 256, 1), (8 * 8, 512, 1), (2 * 8, 512, 4), (8, 4096, 8), (1, 4096, 64), (1, 8, 1)],
)
def test_splits_fill_the_memory_bandwidth(num_blocks: int, max_pages: int, splits: int) -> None:
    assert num_splits(num_blocks, max_pages, 16) == splits


def test_what_does_not_fit_is_refused() -> None:
    assert gpu.unsupported(head_dim=128, dtype="bfloat16") is None
    reason = gpu.unsupported(head_dim=128, dtype="float32")
    assert reason is not None and "tf32" in reason
    reason = gpu.unsupported(head_dim=72, dtype="bfloat16")
    assert reason is not None and "72" in reason
    assert gpu.unsupported(head_dim=192, dtype="bfloat16") is None
    reason = gpu.unsupported(head_dim=160, dtype="bfloat16")
    assert reason is not None and "160 is beyond 128 and no multiple of 64" in reason
    assert gpu.unsupported(head_dim=128, dtype="int8") is None
    reason = gpu.unsupported(head_dim=256, dtype="float8_e4m3fn")
    assert reason is not None and "beyond 128: shared memory" in reason
    arrays = narrow(64, 2, 1, lens=[(1, 3)], page_size=4).arrays(0)
    with pytest.raises(UnsupportedKernel, match="at least 8"):
        gpu.paged_attention(layer=0, scale=1.0, **arrays)
