"""The TPU's kv_update against the reference, interpreted on the host."""

from __future__ import annotations

import secrets
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import UnsupportedKernel
from pallas_kernels.kv_update import (
    empty_pages,
    kv_update,
    page_width,
    reference,
    scales_width,
    tpu,
)
from pallas_kernels.quantized_pages import QuantizedPages, halves, quantize

L, P, K = 2, 12, 3
#: (tokens, first position) of rows that write, each to pages of its own.
DECODE = [(1, 0), (1, 15), (1, 16), (1, 31)]
MIXED = [(1, 7), (37, 9), (16, 0), (2, 15), (1, 30)]


def arrays(
    rows: list[tuple[int, int]], dtype: str, head_dim: int, page_size: int, padding: int
) -> tuple[Any, ...]:
    """Pages, keys, values, and the tokens' places; padding goes to the null page."""
    rng = np.random.default_rng(secrets.randbits(32))
    shape = (L, P, K, page_size, page_width(head_dim, "tpu"))
    pages = jnp.asarray(rng.standard_normal(shape), dtype)
    free = list(rng.permutation(np.arange(1, P)))
    token_pages, offsets = [], []
    for count, first in rows:
        own = [free.pop() for _ in range((first + count - 1) // page_size + 1)]
        for position in range(first, first + count):
            token_pages.append(own[position // page_size])
            offsets.append(position % page_size)
    token_pages += [0] * padding
    offsets += [0] * padding
    new = [rng.standard_normal((len(offsets), K, head_dim)).astype(np.float32) for _ in "kv"]
    return pages, *new, np.asarray(token_pages, np.int32), np.asarray(offsets, np.int32)


def check(rows: list[tuple[int, int]], interpret: Any, **options: Any) -> None:
    """Everything but the null page and the unused lanes is as the reference says."""
    settings = {"dtype": "bfloat16", "head_dim": 64, "page_size": 32, "padding": 3, **options}
    pages, k_new, v_new, token_pages, offsets = arrays(rows, **settings)
    want = reference.kv_update(np.asarray(pages), k_new, v_new, 1, token_pages, offsets)
    got = tpu.kv_update(
        pages, *map(jnp.asarray, (k_new, v_new)), 1, *map(jnp.asarray, (token_pages, offsets)),
        num_rows=len(rows), interpret=interpret,
    )  # fmt: skip
    halves = zip(np.split(np.asarray(got), 2, -1), np.split(want, 2, -1), strict=True)
    for ours, theirs in halves:
        head_dim = settings["head_dim"]
        np.testing.assert_array_equal(ours[:, 1:, ..., :head_dim], theirs[:, 1:, ..., :head_dim])


@pytest.mark.parametrize("rows", [DECODE, MIXED, []])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_matches_reference(rows: list[tuple[int, int]], dtype: str) -> None:
    check(rows, True, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 16), (80, 64), (256, 32)])
def test_heads_and_pages(head_dim: int, page_size: int) -> None:
    check([(5, 3), (1, 2)], True, head_dim=head_dim, page_size=page_size)


def check_codes(rows: list[tuple[int, int]], dtype: str, interpret: Any, **options: Any) -> None:
    """Codes and scales are as the reference says, each as if they were pages of numbers."""
    settings = {"head_dim": 64, "page_size": 32, "padding": 3, **options}
    page_size = settings["page_size"]
    numbers, k_new, v_new, *where = arrays(rows, "float32", **settings)
    scales = np.random.default_rng(0).random((L, P, K, scales_width(page_size, "tpu")), np.float32)
    pages = QuantizedPages(jnp.asarray(numbers * 30).astype(jnp.int8), jnp.asarray(scales), dtype)
    (k_codes, k_scales), (v_codes, v_scales) = (
        map(np.asarray, quantize(jnp.asarray(new), dtype)) for new in (k_new, v_new)
    )
    want_codes = reference.kv_update(np.asarray(pages.codes), k_codes, v_codes, 1, *where)
    by_position = np.stack(halves(scales, page_size), axis=-1)
    want_scales = reference.kv_update(
        by_position, k_scales[..., None], v_scales[..., None], 1, *where
    )
    got = tpu.kv_update(
        pages, *map(jnp.asarray, (k_new, v_new)), 1, *map(jnp.asarray, where),
        num_rows=len(rows), interpret=interpret,
    )  # fmt: skip
    assert isinstance(got, QuantizedPages) and got.kind == dtype
    for ours, theirs in zip(
        np.split(np.asarray(got.codes), 2, -1), np.split(want_codes, 2, -1), strict=True
    ):
        head_dim = settings["head_dim"]
        np.testing.assert_array_equal(ours[:, 1:, ..., :head_dim], theirs[:, 1:, ..., :head_dim])
    np.testing.assert_array_equal(
        np.stack(halves(np.asarray(got.scales), page_size), axis=-1)[:, 1:], want_scales[:, 1:]
    )


@pytest.mark.parametrize("rows", [DECODE, MIXED, []])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_match_reference(rows: list[tuple[int, int]], dtype: str) -> None:
    check_codes(rows, dtype, True)


@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 96), (80, 64), (64, 128)])
def test_runs_of_one_page_share_its_scales(head_dim: int, page_size: int) -> None:
    """A row of several tiles of a page, and rows that leave most of a page as it was."""
    rows = [(70, 20), (1, 63), (2, 31), (5, 3)]
    check_codes(rows, "int8", True, head_dim=head_dim, page_size=page_size)


def test_codes_match_reference_with_simulated_copies() -> None:
    """Runs of one page find its scales in VMEM, not fetched again: only the simulation shows it."""
    interpret = pltpu.InterpretParams(dma_execution_mode="on_wait")
    check_codes([(70, 20), (1, 5), (2, 31)], "int8", interpret, page_size=64)


@pytest.mark.slow
def test_matches_reference_with_simulated_copies() -> None:
    check(MIXED, pltpu.InterpretParams(dma_execution_mode="on_wait"))


def test_as_many_runs_as_there_can_be() -> None:
    """Rows that begin and end in the middle of a tile, so that the bound on runs is reached."""
    check([(18, 15), (18, 15)], True, padding=0)
    check([(2, 15)] * 4, True, padding=0)


def test_what_does_not_fit_is_refused() -> None:
    pages, k_new, v_new, token_pages, offsets = arrays(DECODE, "bfloat16", 64, 32, 0)
    with pytest.raises(UnsupportedKernel, match="pages of 16 positions"):
        tpu.kv_update(pages[:, :, :, :8], k_new, v_new, 0, token_pages, offsets)
    with pytest.raises(UnsupportedKernel, match="float16"):
        kv_update(pages.astype(jnp.float16), k_new, v_new, 0, token_pages, offsets, backend="tpu")
    new = k_new, v_new, 0, token_pages, offsets
    codes = pages[:, :, :, :16].astype(jnp.int8)
    with pytest.raises(UnsupportedKernel, match="pages of 32 positions"):
        tpu.kv_update(QuantizedPages(codes, jnp.zeros((L, P, K, 128)), "int8"), *new)
    codes, scales = pages.astype(jnp.int8), jnp.zeros((L, P, K, 64))
    with pytest.raises(UnsupportedKernel, match="use scales_width"):
        tpu.kv_update(QuantizedPages(codes, scales, "int8"), *new)


def test_empty_pages_have_scales_in_whole_registers() -> None:
    pages = empty_pages((L, P, K, 96, 128), "int8", backend="tpu")
    assert isinstance(pages, QuantizedPages)
    assert pages.codes.shape == (L, P, K, 96, 128) and pages.scales.shape == (L, P, K, 256)
