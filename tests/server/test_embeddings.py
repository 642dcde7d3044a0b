"""The embedded encoder through the whole server, with the real client, beside generation.

Expected vectors are sentence-transformers' (tests/models/test_minilm.py).
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from tests.models.test_bert import DATA
from tests.server.conftest import Server

pytestmark = pytest.mark.slow

MODEL = "all-minilm-l6-v2"
TEXTS: list[str] = json.loads((DATA / "minilm" / "texts.json").read_text())


def test_vectors_are_sentence_transformers(client: OpenAI, server: Server) -> None:
    wanted = np.load(DATA / "minilm" / "vectors.npy")
    answer = client.embeddings.create(model=MODEL, input=TEXTS, extra_body={"truncate": True})
    found = np.array([entry.embedding for entry in answer.data])  # base64, by the client's default
    assert (found * wanted).sum(1).min() >= 0.9999
    plain = client.embeddings.create(
        model=MODEL, input=TEXTS[:20], encoding_format="float", dimensions=64
    )
    cut = wanted[:20, :64] / np.linalg.norm(wanted[:20, :64], axis=1, keepdims=True)
    np.testing.assert_allclose([entry.embedding for entry in plain.data], cut, atol=1e-5)
    metrics = server.metrics()
    assert metrics["jaxserve_embedded_texts_total"] >= 220
    assert metrics["jaxserve_compiles_after_warmup"] == 0


def test_token_ids_are_taken_as_they_are(client: OpenAI) -> None:
    wanted = client.embeddings.create(model=MODEL, input="hello world").data[0].embedding
    found = client.embeddings.create(model=MODEL, input=[101, 7592, 2088, 102])  # [CLS] … [SEP]
    np.testing.assert_allclose(found.data[0].embedding, wanted, atol=1e-6)


def test_limits_are_said(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="at most 2048 texts, got a list of 10000"):
        client.embeddings.create(model=MODEL, input=["a"] * 10_000)
    with pytest.raises(BadRequestError, match="between 1 and 384, got 1024"):
        client.embeddings.create(model=MODEL, input="a", dimensions=1024)
    with pytest.raises(BadRequestError, match="has 302 tokens, the model takes 256"):
        client.embeddings.create(model=MODEL, input="a " * 300)


def test_many_texts_beside_a_stream(client: OpenAI) -> None:
    """What each brings is what it brings alone."""

    def generate(pieces: list[str], begun: threading.Event) -> None:
        for chunk in client.completions.create(
            model="smollm2-135m-instruct",
            prompt="Once upon a time",
            max_tokens=200,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            pieces += [choice.text for choice in chunk.choices]
            begun.set()

    def embed(texts: list[str]) -> np.ndarray:
        data = client.embeddings.create(model=MODEL, input=texts).data
        assert [entry.index for entry in data] == list(range(len(texts)))
        return np.array([entry.embedding for entry in data])

    texts = [f"number {n}" for n in range(2048)]
    beside, alone, begun = [], [], threading.Event()
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(generate, beside, begun)
        assert begun.wait(60)
        num_before = len(beside)
        many = embed(texts)
        num_after = len(beside)
        stream.result()
    assert num_after - num_before >= 10  # they took turns
    generate(alone, begun)
    assert "".join(beside) == "".join(alone)
    np.testing.assert_allclose(embed(texts), many, atol=1e-5, rtol=0)
    for place in (0, 10, 1234, 2047):
        np.testing.assert_allclose(embed([texts[place]])[0], many[place], atol=1e-5, rtol=0)


def test_what_means_the_same_ranks_first(server: Server) -> None:
    body = {
        "query": "What is the capital of France?",
        "documents": ["Bananas are rich in potassium.", "Paris is the capital of France."],
    }
    results = httpx.post(f"{server.base_url}/v1/rerank", json=body).json()["results"]
    assert [result["index"] for result in results] == [1, 0]
    assert results[0]["relevance_score"] > 0.7 > 0.3 > results[1]["relevance_score"]
