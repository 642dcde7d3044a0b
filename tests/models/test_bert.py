"""Encoders against sentence-transformers and transformers, on small random checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.device.embed_step import EmbedBuckets, EmbedInput
from jaxserve.device.embedder import Embedder
from jaxserve.errors import UnsupportedModel
from jaxserve.models.bert import encoder_spec
from jaxserve.models.options import ModelOptions
from jaxserve.types import POOLINGS
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_encoder

DATA = Path(__file__).parent.parent / "data" / "embeddings"
XLA = ModelOptions()
NATIVE = ModelOptions(matmul="cpu", attention="cpu")
MAX_LEN = 62


def embedder(case: str, options: ModelOptions) -> Embedder:
    model = load_encoder(DATA / case, options=options)
    made = Embedder(model, EmbedBuckets(MAX_LEN, 144, in_grid=options.attention == "xla"))
    made.warm_up(lambda *_: None)
    return made


def sequences(reference: Any) -> list[list[int]]:
    ends = np.cumsum(reference["lengths"])[:-1]
    return [part.tolist() for part in np.split(reference["tokens"], ends)]


@pytest.mark.parametrize("options", [XLA, NATIVE], ids=["xla", "native"])
@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_every_pooling_is_sentence_transformers(case, options):
    reference = np.load(DATA / case / "reference.npz")
    found = embedder(case, options)
    texts = sequences(reference)
    mixed = [
        (text, code, reference[name][row])
        for row, text in enumerate(texts)
        for code, name in enumerate(POOLINGS)
    ]
    np.random.default_rng(0).shuffle(mixed)  # poolings side by side in one step
    for start in range(0, len(mixed), 3):
        part = mixed[start : start + 3]
        inputs = [EmbedInput(token_ids=text, pooling=code) for text, code, _ in part]
        vectors = found.collect(found.launch(inputs)).vectors
        for vector, (_, code, wanted) in zip(vectors, part, strict=True):
            np.testing.assert_allclose(vector, wanted, atol=2e-5, err_msg=POOLINGS[code])


@pytest.mark.parametrize("options", [XLA, NATIVE], ids=["xla", "native"])
@pytest.mark.parametrize("case", ["bert_pairs", "roberta_pairs"])
def test_labels_of_pairs_are_transformers(case, options):
    reference = np.load(DATA / case / "reference.npz")
    found = embedder(case, options)
    inputs = [
        EmbedInput(token_ids=text, second_start=int(start), pooling=POOLINGS.index("cls"))
        for text, start in zip(sequences(reference), reference["starts"], strict=True)
    ]
    labels = np.concatenate(
        [found.collect(found.launch(inputs[i : i + 2])).vectors for i in range(0, len(inputs), 2)]
    )
    assert labels.shape == (len(inputs), 1)
    np.testing.assert_allclose(labels[:, 0], reference["labels"], atol=2e-5)
    if case == "bert_pairs":  # which text is the second one matters
        other = found.collect(found.launch([replace_start(inputs[3])])).vectors[0, 0]
        assert abs(other - reference["labels"][3]) > 1e-3


def replace_start(text: EmbedInput) -> EmbedInput:
    return replace(text, second_start=1)


def test_what_is_not_implemented_is_refused():
    config = dict(open_checkpoint(DATA / "bert").config)
    for change, match in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_attention_heads": 7}, "must divide"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            "num_labels=2: a cross-encoder has one label",
        ),
    ):
        with pytest.raises(UnsupportedModel, match=match):
            encoder_spec(config | change)


def test_a_prefix_is_known_by_the_tensors():
    config = open_checkpoint(DATA / "bert_pairs").config
    assert encoder_spec(config, ["bert.embeddings.LayerNorm.weight"]).prefix == "bert."
    assert encoder_spec(config, ["embeddings.LayerNorm.weight"]).prefix == ""
