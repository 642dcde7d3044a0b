"""Embedding steps on the device: the same vector alone and in any company, and of a decoder."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.device.compiles import compile_counter
from jaxserve.device.embed_step import EmbedBuckets, EmbedInput
from jaxserve.device.embedder import Embedder
from jaxserve.models.options import ModelOptions
from jaxserve.types import POOLINGS
from jaxserve.weights.load import load_encoder
from tests.models.driver import Driver
from tests.models.loading import load_tiny
from tests.models.test_bert import DATA

XLA = ModelOptions()
NATIVE = ModelOptions(matmul="cpu", attention="cpu")


def cold(model, *, in_grid: bool, max_tokens: int = 64) -> Embedder:
    return Embedder(model, EmbedBuckets(40, max_tokens, in_grid=in_grid), page_size=4)


@pytest.fixture(scope="module", params=[XLA, NATIVE], ids=["xla", "native"])
def bert(request) -> Embedder:
    """An encoder, with either kind of kernels."""
    model = load_encoder(DATA / "bert", options=request.param)
    found = cold(model, in_grid=request.param is XLA, max_tokens=128)
    found.warm_up(lambda *_: None)
    return found


def run(embedder: Embedder, texts: list[list[int]], pooling: str = "mean") -> np.ndarray:
    code = POOLINGS.index(pooling)
    inputs = [EmbedInput(token_ids=text, pooling=code) for text in texts]
    return embedder.collect(embedder.launch(inputs)).vectors


def texts(vocab: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(1, vocab, length).tolist() for length in lengths]


def test_a_vector_does_not_depend_on_the_batch(bert):
    """sentence-transformers' issue 3197 is about vectors that do."""
    counted = compile_counter().count
    own = texts(96, (9,))[0]
    alone = run(bert, [own])[0]
    for company in ((), (1,), (40, 3), (7, 7, 7, 7, 7), (30, 2, 33)):
        others = texts(96, company)
        for place in range(len(others) + 1):
            batch = [*others[:place], own, *others[place:]]
            np.testing.assert_allclose(run(bert, batch)[place], alone, atol=1e-5, rtol=0)
    assert compile_counter().count == counted  # all programs were compiled before


def test_device_times_follow_each_other(bert):
    text = EmbedInput(token_ids=[1, 2, 3])
    first, second = bert.launch([text]), bert.launch([text])
    outputs = [bert.collect(first), bert.collect(second)]
    assert outputs[0].idle_ns >= 0 and outputs[1].idle_ns == 0  # it was launched before the first
    assert all(0 < output.device_ns < 10**9 for output in outputs)


@pytest.mark.parametrize(
    ("case", "options"), [("llama3", XLA), ("gemma2", NATIVE)], ids=["xla", "native"]
)
def test_a_decoders_states_are_those_it_generates_from(case, options):
    model = load_tiny(case, options)
    sequences = texts(model.spec.vocab_size, (1, 4, 17, 40))
    embedder = cold(model, in_grid=False)
    embedder.warm_up(lambda *_: None)
    for pooling, pick in (("last", lambda states: states[-1]), ("mean", lambda s: s.mean(0))):
        vectors = run(embedder, sequences, pooling)
        for vector, tokens in zip(vectors, sequences, strict=True):
            driver = Driver(model, 1, 64)
            _, hidden = driver.step({0: tokens}, num_rows=2, num_tokens=40)
            wanted = pick(np.asarray(hidden)[: len(tokens)])
            np.testing.assert_allclose(vector, wanted, atol=1e-4, rtol=1e-4)


def test_work_is_counted_from_lengths():
    embedder = cold(load_encoder(DATA / "bert", options=XLA), in_grid=True)
    matrices = 2 * (4 * 64 * 64 + 2 * 64 * 96)
    flops, num_bytes = embedder.count_work([3, 5])
    assert flops == 2 * matrices * 8 + 4 * 2 * 64 * (9 + 25)
    assert num_bytes == 4 * matrices
    decoder = cold(load_tiny("llama3", XLA), in_grid=False)
    assert decoder.count_work([4])[0] > 0
