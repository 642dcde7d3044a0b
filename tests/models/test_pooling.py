"""Pooling: each kind by hand, rows apart from each other, and a NaN that stays with its own."""

from __future__ import annotations

import jax
import numpy as np

from jaxserve.models.pooling import pool
from jaxserve.types import POOLINGS


def by_hand(states: np.ndarray, name: str) -> np.ndarray:
    place = np.arange(1, len(states) + 1)[:, None]
    return {
        "cls": states[0],
        "mean": states.mean(0),
        "max": states.max(0),
        "last": states[-1],
        "weightedmean": (states * place).sum(0) / place.sum(),
    }[name]


def run(states: np.ndarray, lengths: list[int], codes: list[int], num_tokens: int = 32):
    hidden = np.full((num_tokens, states.shape[1]), np.nan, np.float32)  # padding is never read
    hidden[: len(states)] = states
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return np.asarray(jax.jit(pool)(hidden, starts, np.array(codes, np.int32)))


def test_each_row_has_its_own_pooling():
    rng = np.random.default_rng(3)
    lengths = [1, 4, 7, 2, 5, 0, 3]
    codes = [1, 2, 3, 4, 0, 1, 2]
    states = rng.normal(size=(sum(lengths), 5)).astype(np.float32) - 2
    found = run(states, lengths, codes)
    parts = np.split(states, np.cumsum(lengths)[:-1])
    for row, (part, code) in enumerate(zip(parts, codes, strict=True)):
        wanted = by_hand(part, POOLINGS[code]) if len(part) else np.zeros(5)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-6)


def test_a_row_is_the_same_in_any_company():
    rng = np.random.default_rng(4)
    states = rng.normal(size=(12, 5)).astype(np.float32)
    own = states[4:9]
    for code in range(len(POOLINGS)):
        together = run(states, [4, 5, 3], [1, code, 2])[1]
        alone = run(own, [5, 0, 0], [code, 1, 1])[0]
        np.testing.assert_array_equal(together, alone)


def test_a_nan_stays_with_its_row():
    states = np.ones((6, 3), np.float32)
    states[1, 2] = np.nan
    found = run(states, [2, 4], [1, 1])
    assert np.isnan(found[0, 2]) and np.isfinite(found[1]).all()
