"""Masks on logits against a few lines of numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling.mask import mask_logits


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 200])
def test_what_is_not_allowed_is_ruled_out(vocab_size: int) -> None:
    random = np.random.default_rng(vocab_size)
    logits = random.normal(size=(5, vocab_size)).astype(np.float32)
    allowed = random.random((5, vocab_size)) < 0.4
    padded = np.zeros((5, -(-vocab_size // 32) * 32), np.uint8)
    padded[:, :vocab_size] = allowed
    masks = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    found = np.asarray(mask_logits(jnp.asarray(logits), jnp.asarray(masks)))
    np.testing.assert_array_equal(found, np.where(allowed, logits, -np.inf))
