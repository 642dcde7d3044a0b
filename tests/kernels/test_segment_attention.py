"""Segment attention against the plain reference; a row alone and in company."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedKernel, native
from pallas_kernels.segment_attention import reference, segment_attention

LENGTHS = [1, 5, 6, 7, 16, 17, 0, 33, 40, 2]
SCALE = 0.3


def batch(lengths: list[int], heads: int = 3, size: int = 32, padding: int = 9):
    rng = np.random.default_rng(sum(lengths))
    qkv = rng.normal(size=(sum(lengths) + padding, 3, heads, size)).astype(np.float32)
    return 2 * qkv, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def run(backend: str, qkv, starts, max_len: int = 48):
    if backend == "cpu" and native.load().reason is not None:
        pytest.skip(f"no native kernels: {native.load().reason}")
    attend = jax.jit(segment_attention, static_argnames=("scale", "max_len", "backend"))
    return np.asarray(attend(qkv, starts, scale=SCALE, max_len=max_len, backend=backend))


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_equals_the_reference(backend, size):
    qkv, starts = batch(LENGTHS, size=size)
    found = run(backend, qkv, starts)
    num_live = starts[-1]
    wanted = reference.segment_attention(qkv, starts, SCALE)
    np.testing.assert_allclose(found[:num_live], wanted[:num_live], atol=2e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_a_row_does_not_see_its_company_nor_padding(backend):
    qkv, starts = batch(LENGTHS)
    found = run(backend, qkv, starts)
    qkv[starts[-1] :] = np.nan if backend == "cpu" else 1e4
    for row in (0, 4, 8):
        first, last = starts[row : row + 2]
        alone = np.zeros_like(qkv)
        alone[: last - first] = qkv[first:last]
        places = np.zeros_like(starts)
        places[1:] = last - first
        own = run(backend, alone, places)[: last - first]
        np.testing.assert_allclose(own, found[first:last], atol=1e-6)
    again = run(backend, qkv, starts)[: starts[-1]]
    np.testing.assert_array_equal(again, found[: starts[-1]])


def test_large_scores_do_not_overflow():
    qkv, starts = batch([12, 20])
    for backend in ("xla", "cpu"):
        assert np.isfinite(run(backend, qkv * 100, starts)).all()


def test_bfloat16_in_and_out():
    qkv, starts = batch(LENGTHS)
    found = run("xla", jnp.asarray(qkv, jnp.bfloat16), starts)
    assert found.dtype == jnp.bfloat16
    wanted = reference.segment_attention(qkv, starts, SCALE)
    live = slice(0, starts[-1])
    np.testing.assert_allclose(found[live].astype(np.float32), wanted[live], atol=0.2)


def test_what_cannot_be_is_refused():
    qkv, starts = batch([4])
    with pytest.raises(ValueError, match="segment_attention has xla, cpu"):
        segment_attention(qkv, starts, scale=1.0, max_len=4, backend="tpu")
    with pytest.raises(ValueError, match="give \\[tokens, 3, heads, head size\\]"):
        segment_attention(qkv[:, :2], starts, scale=1.0, max_len=4, backend="xla")
    with pytest.raises(UnsupportedKernel, match="no multiple of 16"):
        segment_attention(qkv[..., :12], starts, scale=1.0, max_len=4, backend="cpu")
