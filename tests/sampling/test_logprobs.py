"""Log-probabilities against float64, in slices and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sampling.logprobs import SLICE_TOKENS, logprobs, logprobs_if, prompt_logprobs


def expected(logits, tokens):
    logits = logits.astype(np.float64)
    largest = logits.max(axis=1, keepdims=True)
    values = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    own = np.take_along_axis(values, tokens[:, None], axis=1)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    return own[:, 0], (values > own).sum(axis=1), order, np.take_along_axis(values, order, axis=1)


@given(st.integers(0, 2**32), st.sampled_from([25, 700, 5000]), st.booleans(), st.booleans())
def test_equals_float64(seed, vocab_size, ties, masked):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, vocab_size)).astype(np.float32) * 4
    if ties:
        logits = np.round(logits) + np.float32(0.0)  # no -0.0, which top_k puts behind 0.0
    if masked:
        logits[:, ::2] = -np.inf
    tokens = rng.integers(0, vocab_size, 4).astype(np.int32)
    chosen, rank, top_ids, top_values = jax.jit(logprobs)(logits, tokens)
    own, own_rank, order, values = expected(logits, tokens)
    np.testing.assert_allclose(chosen, own, atol=1e-5)
    np.testing.assert_array_equal(rank, own_rank)
    real = np.isfinite(values)
    np.testing.assert_array_equal(np.asarray(top_ids)[real], order[real])
    np.testing.assert_allclose(top_values, values, atol=1e-5)


def test_small_vocabulary_is_padded():
    result = logprobs(jnp.zeros((1, 3)), jnp.array([2]))
    assert result.top_ids.tolist() == [[0, 1, 2] + [0] * 17]
    np.testing.assert_allclose(result.top_values[0, :3], np.log(1 / 3), rtol=1e-6)
    assert np.all(np.isneginf(result.top_values[0, 3:]))
    assert result.rank.tolist() == [0]


def test_not_wanted_is_zeros_of_the_same_shapes():
    logits, tokens = jnp.ones((2, 30)), jnp.array([1, 2])
    conditional = jax.jit(logprobs_if)
    wanted, unwanted = (conditional(flag, logits, tokens) for flag in (True, False))
    jax.tree.map(np.testing.assert_array_equal, wanted, logprobs(logits, tokens))
    assert not any(np.any(part) for part in unwanted)
    assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(jnp.shape, unwanted)


@pytest.mark.parametrize("num_tokens", [1, SLICE_TOKENS, SLICE_TOKENS + 1, 200])
def test_slices_give_what_the_whole_gives(num_tokens):
    rng = np.random.default_rng(num_tokens)
    head = rng.normal(size=(8, 90)).astype(np.float32)
    hidden = rng.normal(size=(num_tokens, 8)).astype(np.float32)
    tokens = rng.integers(0, 90, num_tokens).astype(np.int32)

    @jax.jit
    def sliced(hidden, tokens):
        return prompt_logprobs(lambda part: part @ head, hidden, tokens)

    result = sliced(hidden, tokens)
    whole = logprobs(jnp.asarray(hidden) @ head, tokens)
    np.testing.assert_allclose(result.chosen, whole.chosen, atol=1e-5)
    np.testing.assert_array_equal(result.top_ids[:, 0], whole.top_ids[:, 0])
    np.testing.assert_allclose(result.top_values, whole.top_values, atol=1e-5)
    if num_tokens > SLICE_TOKENS:
        text = sliced.lower(hidden, tokens).compile().as_text()
        assert f"[{num_tokens},90]" not in text
