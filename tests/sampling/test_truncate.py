"""The k-th largest logit against sorting."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sampling.blocks import in_runs
from jaxserve.sampling.truncate import from_order, kth_largest, order

VOCAB_SIZE = 150


@jax.jit
def thresholds(logits, k):
    return kth_largest(in_runs(logits), logits.max(axis=1), k)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**32),
            st.sampled_from(["normal", "ties", "masked", "huge", "equal", "zeros"]),
            st.integers(0, VOCAB_SIZE - 1),
        ),
        min_size=3,
        max_size=3,
    )
)
def test_keeps_the_k_largest_and_their_ties(cases):
    logits = np.zeros((3, VOCAB_SIZE), np.float32)
    for row, (seed, kind, _) in zip(logits, cases, strict=True):
        rng = np.random.default_rng(seed)
        row[:] = rng.normal(size=VOCAB_SIZE)
        if kind == "ties":
            row[:] = np.round(row)
        elif kind == "masked":
            row[rng.permutation(VOCAB_SIZE)[: rng.integers(1, VOCAB_SIZE)]] = -np.inf
        elif kind == "huge":
            row *= np.float32(10.0) ** rng.integers(-30, 30, VOCAB_SIZE)
        elif kind == "equal":
            row[:] = row[0]
        elif kind == "zeros":
            row[:] = np.where(row > 0, 0.0, -0.0)
    k = np.array([k for _, _, k in cases], np.int32)
    result = np.array(thresholds(logits, k))
    # XLA's comparisons on CPU take numbers too small for normal float32 as 0; numpy's do not.
    result[np.abs(result) < np.finfo(np.float32).tiny] = 0.0
    for row, threshold, one in zip(logits, result, k, strict=True):
        expected = row >= np.sort(row)[VOCAB_SIZE - one] if one else np.full(VOCAB_SIZE, True)
        np.testing.assert_array_equal(row >= threshold, expected)


@given(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False))
def test_order_is_that_of_the_floats_and_back(a, b):
    pair = np.array([a, b], np.float32)
    low, high = np.asarray(order(pair))
    assert (low < high) == (a < b) or a == b == 0
    np.testing.assert_array_equal(from_order(order(pair)), pair)
