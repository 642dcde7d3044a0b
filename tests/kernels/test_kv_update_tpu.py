"""The TPU's kv_update against the reference, interpreted on the host."""

from __future__ import annotations

import secrets
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import UnsupportedKernel
from pallas_kernels.kv_update import kv_update, page_width, reference, tpu

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
    with pytest.raises(UnsupportedKernel, match="int8"):
        kv_update(pages.astype(jnp.int8), k_new, v_new, 0, token_pages, offsets, backend="tpu")
