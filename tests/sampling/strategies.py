"""Rows with every parameter, extremes included, for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from jaxserve.types import SamplingParams
from tests.sampling.reference import Row

VOCAB_SIZE = 75  # not a multiple of anything that matters
EOS_TOKEN_IDS = (2, 74)


def sampling_params(vocab_size: int = VOCAB_SIZE) -> st.SearchStrategy[SamplingParams]:
    tokens = st.integers(0, vocab_size - 1)
    penalties = st.sampled_from([0.0, 0.0, -2.0, 0.3, 2.0])
    return st.builds(
        SamplingParams,
        max_tokens=st.just(100),
        seed=st.integers(-(2**63), 2**64 - 1),
        min_tokens=st.sampled_from([0, 0, 3, 100]),
        temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0, 1e6]),
        top_k=st.sampled_from([0, 0, 1, 2, 5, 50, vocab_size - 1, vocab_size, 2**31 - 1]),
        top_p=st.sampled_from([1.0, 1.0, 0.0, 1e-6, 0.5, 0.9, 0.999]),
        min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.1, 1.0]),
        presence_penalty=penalties,
        frequency_penalty=penalties,
        repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3, 1e-6]),
        stop_token_ids=st.lists(tokens, max_size=3, unique=True).map(tuple),
        logit_bias=st.dictionaries(
            tokens, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=6
        ).map(lambda biases: tuple(biases.items())),
        allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=40).map(tuple),
        bad_words=st.lists(
            st.lists(st.integers(0, 4), min_size=1, max_size=8).map(tuple), max_size=4
        ).map(tuple),
    )


@st.composite
def rows(draw: st.DrawFn, vocab_size: int = VOCAB_SIZE) -> Row:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]))
    logits = (rng.normal(size=vocab_size) * scale).astype(np.float32)
    shape = draw(st.sampled_from(["smooth", "ties", "spike", "one left"]))
    if shape == "ties":
        logits = np.round(logits)
    elif shape == "spike":
        logits[rng.integers(vocab_size)] += 100
    elif shape == "one left":
        logits[np.arange(vocab_size) != rng.integers(vocab_size)] = -np.inf
    few = st.integers(0, 4)  # so that bad words and repetitions occur
    return Row(
        logits=logits,
        sampling=draw(sampling_params(vocab_size)),
        prompt=draw(st.lists(few, min_size=1, max_size=12)),
        output=draw(st.lists(few, max_size=12)),
        choice=draw(st.integers(0, 127)),
        eos_token_ids=EOS_TOKEN_IDS,
    )
