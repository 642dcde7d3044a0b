"""/v1/score and /v1/rerank: cosines of a bi-encoder, labels of a cross-encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from jaxserve.config import EmbeddingsConfig
from tests.fakes.embedder import label_of, vector_of
from tests.http.frontend import CONFIG, Front
from tests.http.frontend import front as make_front

SCORE, RERANK = "/v1/score", "/v1/rerank"
DOCUMENTS = ["a storm", "the sea", "a storm", "marmalade"]


def over(model: str) -> AbstractContextManager[Front]:
    embeddings = EmbeddingsConfig(model=model, max_inputs=20)
    return make_front(config=dataclasses.replace(CONFIG, embeddings=embeddings))


@pytest.fixture(scope="module")
def bi() -> Iterator[Front]:
    """With a bi-encoder."""
    with over("fake") as made:
        yield made


@pytest.fixture(scope="module")
def cross() -> Iterator[Front]:
    """With a cross-encoder."""
    with over("pairs") as made:
        yield made


def cosine(query: str, document: str) -> float:
    first, second = (vector_of(list(text.encode())) for text in ("q: " + query, "p: " + document))
    return float(first @ second)


def probability(first: str, second: str) -> float:
    tokens = [*first.encode(), 256, *second.encode()]
    return 1 / (1 + math.exp(-label_of(tokens, len(first) + 1)))


def scores(answer) -> list[float]:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return [entry["score"] for entry in answer["data"]]


def test_one_text_with_several(bi, cross):
    body = {"text_1": "wind", "text_2": DOCUMENTS}
    answer = bi.ok(SCORE, body)
    assert scores(answer) == pytest.approx([cosine("wind", d) for d in DOCUMENTS], abs=1e-6)
    assert answer["id"].startswith("score-") and answer["object"] == "list"
    num_tokens = sum(3 + len(text) for text in ("wind", *dict.fromkeys(DOCUMENTS)))
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    answer = cross.ok(SCORE, body)
    assert scores(answer) == pytest.approx([probability("wind", d) for d in DOCUMENTS], abs=1e-6)
    assert answer["usage"]["prompt_tokens"] == sum(len("wind") + 1 + len(d) for d in DOCUMENTS)


def test_pair_by_pair(bi, cross):
    body = {"text_1": ["wind", "salt"], "text_2": ["a storm", "the sea"]}
    pairs = list(zip(body["text_1"], body["text_2"], strict=True))
    wanted = [cosine(*pair) for pair in pairs]
    assert scores(bi.ok(SCORE, body)) == pytest.approx(wanted, abs=1e-6)
    wanted = [probability(*pair) for pair in pairs]
    assert scores(cross.ok(SCORE, body)) == pytest.approx(wanted, abs=1e-6)
    raw = scores(cross.ok(SCORE, body | {"use_activation": False}))
    assert [1 / (1 + math.exp(-x)) for x in raw] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_rerank_sorts_and_cuts(kind, request):
    front, score = request.getfixturevalue(kind), {"bi": cosine, "cross": probability}[kind]
    wanted = sorted(range(4), key=lambda i: -score("wind", DOCUMENTS[i]))
    answer = front.ok(RERANK, {"query": "wind", "documents": DOCUMENTS})
    assert [result["index"] for result in answer["results"]] == wanted
    found = [result["relevance_score"] for result in answer["results"]]
    assert found == pytest.approx([score("wind", DOCUMENTS[i]) for i in wanted], abs=1e-6)
    assert answer["results"][0]["document"] == {"text": DOCUMENTS[wanted[0]]}
    body = {
        "query": "wind",
        "documents": [{"text": text} for text in DOCUMENTS],
        "top_n": 2,
        "return_documents": False,
    }
    short = front.ok(RERANK, body)["results"]
    assert [result["index"] for result in short] == wanted[:2]
    assert "document" not in short[0]


def test_long_texts(bi, cross):
    long = "0123456789" * 7
    for front, body in (
        (bi, {"text_1": "a", "text_2": long}),
        (cross, {"text_1": "a", "text_2": long}),
    ):
        assert front.post(SCORE, body).json()["error"]["code"] == "context_length_exceeded"
        assert front.post(SCORE, body | {"truncate": True}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (SCORE, {"text_1": "a"}, "text_2", "a string or a list of strings"),
        (SCORE, {"text_1": [], "text_2": "a"}, "text_1", "got a list of 0"),
        (SCORE, {"text_1": ["a", 2], "text_2": "a"}, "text_1", "made of strings"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["a"] * 3}, "text_2", "2 texts and text_2 3"),
        (SCORE, {"text_1": "a", "text_2": ["a"] * 21}, "text_2", "at most 20 texts"),
        (RERANK, {"documents": ["a"]}, "query", "a string"),
        (RERANK, {"query": "a"}, "documents", "a list of strings"),
        (RERANK, {"query": "a", "documents": [{"title": "b"}]}, "documents", "with a text"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "between 1"),
        (RERANK, {"query": "a", "documents": ["b"], "top": 1}, "top", "nearest is 'top_n'"),
    ],
)
@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_what_is_wrong_is_said(kind, path, body, param, message, request):
    response = request.getfixturevalue(kind).post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_a_cross_encoder_gives_no_embeddings(cross):
    response = cross.post("/v1/embeddings", {"input": "a"})
    assert response.status_code == 400
    assert "is a cross-encoder" in response.json()["error"]["message"]
