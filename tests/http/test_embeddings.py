"""/v1/embeddings against the fake model, whose vectors are known, through the real client too."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from openai import AsyncOpenAI

from jaxserve.config import EmbeddingsConfig, LimitsConfig
from jaxserve.http.keyfile import load_keys
from jaxserve.limits.store import LocalStore, MemoryStore
from tests.fakes.embedder import DIMENSIONS, NIL, NOT_FINITE, vector_of
from tests.http.frontend import CONFIG, Front
from tests.http.frontend import front as make_front
from tests.http.test_limits import FREE_KEY, KEY, _settled, key_config

PATH = "/v1/embeddings"
EMBEDDINGS = EmbeddingsConfig(model="fake", embed_tokens=64, shared_embed_tokens=32, max_inputs=600)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    """An application whose engine embeds too."""
    with make_front(config=dataclasses.replace(CONFIG, embeddings=EMBEDDINGS)) as made:
        yield made


def vectors(answer) -> np.ndarray:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    assert {entry["object"] for entry in answer["data"]} == {"embedding"}
    return np.array([entry["embedding"] for entry in answer["data"]])


def tokens(text: str) -> list[int]:
    return list(text.encode())


def test_one_text_and_its_usage(front):
    answer = front.ok(PATH, {"model": "fake-embedder", "input": "hello"})
    np.testing.assert_allclose(vectors(answer), [vector_of(tokens("hello"))], rtol=1e-6)
    assert answer["object"] == "list" and answer["model"] == "fake-embedder"
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


@pytest.mark.parametrize(
    "value",
    [
        ["a", "bcd", "a"],
        [tokens("a"), tokens("bcd"), tokens("a")],
    ],
    ids=["texts", "token ids"],
)
def test_lists_keep_their_order(front, value):
    found = vectors(front.ok(PATH, {"input": value}))
    wanted = [vector_of(tokens(text)) for text in ("a", "bcd", "a")]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_list_of_integers_is_one_text(front):
    found = vectors(front.ok(PATH, {"input": [5, 6, 7]}))
    np.testing.assert_allclose(found, [vector_of([5, 6, 7])], rtol=1e-6)


def test_more_texts_than_a_group_come_back_in_order(front):
    texts = ["x" * (1 + i % 50) + str(i) for i in range(600)]
    found = vectors(front.ok(PATH, {"input": texts}))
    wanted = [vector_of(tokens(text)) for text in texts]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_base64_is_the_same_numbers(front):
    plain = vectors(front.ok(PATH, {"input": ["ab", "c"]})).astype(np.float32)
    coded = front.ok(PATH, {"input": ["ab", "c"], "encoding_format": "base64"})
    for row, entry in zip(plain, coded["data"], strict=True):
        decoded = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        np.testing.assert_array_equal(decoded, row)


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_the_real_client_reads_them(front, form):
    client = AsyncOpenAI(base_url="http://front/v1", api_key="none", http_client=front.http)
    more = {} if form is None else {"encoding_format": form}
    found = front.run(
        client.embeddings.create(model="fake-embedder", input=["hi", "ho"], dimensions=3, **more)
    )
    data = [entry.embedding for entry in found.data]
    if form == "base64":
        data = [np.frombuffer(base64.b64decode(entry), "<f4") for entry in data]
    wanted = [vector_of(tokens(text), dimensions=3) for text in ("hi", "ho")]
    np.testing.assert_allclose(data, wanted, rtol=1e-6)
    assert found.usage.prompt_tokens == 4


def test_dimensions_are_cut_and_brought_back_to_length_one(front):
    found = vectors(front.ok(PATH, {"input": "hello", "dimensions": 4}))
    np.testing.assert_allclose(found, [vector_of(tokens("hello"), dimensions=4)], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found), 1, rtol=1e-6)
    raw = vectors(front.ok(PATH, {"input": "hello", "dimensions": 4, "normalize": False}))
    wanted = [vector_of(tokens("hello"), dimensions=4, normalize=False)]
    np.testing.assert_allclose(raw, wanted, rtol=1e-6)


def test_pooling_by_request(front):
    for pooling in ("cls", "mean", "max", "last", "weightedmean"):
        found = vectors(front.ok(PATH, {"input": "hello", "pooling": pooling}))
        np.testing.assert_allclose(found, [vector_of(tokens("hello"), pooling)], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, ""),
        ({"prompt_name": "query"}, "q: "),
        ({"input_type": "query"}, "q: "),
        ({"input_type": "search_document"}, "p: "),
        ({"instruction": "Find it: "}, "Find it: "),
    ],
)
def test_words_before_the_texts(front, fields, prefix):
    answer = front.ok(PATH, {"input": ["hello"], **fields})
    np.testing.assert_allclose(vectors(answer), [vector_of(tokens(prefix + "hello"))], rtol=1e-6)
    assert answer["usage"]["prompt_tokens"] == len(prefix) + 5


def test_texts_that_are_too_long(front):
    text = "0123456789" * 7  # 70 tokens, the model takes 64
    for fields, length in (
        ({"truncate": True}, 64),
        ({"truncate": "END"}, 64),
        ({"truncate_prompt_tokens": -1}, 64),
        ({"truncate_prompt_tokens": 10}, 10),
    ):
        answer = front.ok(PATH, {"input": text, **fields})
        np.testing.assert_allclose(vectors(answer), [vector_of(tokens(text)[:length])], rtol=1e-6)
        assert answer["usage"]["prompt_tokens"] == length
    cut = front.ok(PATH, {"input": tokens(text), "truncate": True})
    np.testing.assert_allclose(vectors(cut), [vector_of(tokens(text)[:64])], rtol=1e-6)
    for fields in ({}, {"truncate": False}, {"truncate": "NONE"}):
        response = front.post(PATH, {"input": ["ok", text], **fields})
        error = response.json()["error"]
        assert response.status_code == 400 and error["code"] == "context_length_exceeded"
        assert "has 70 tokens, the model takes 64" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "a string, a list"),
        ({"input": []}, "input", "got a list of 0"),
        ({"input": ""}, "input", "has an empty text"),
        ({"input": ["a", ""]}, "input", "has an empty text"),
        ({"input": [[]]}, "input", "has an empty text"),
        ({"input": ["a", 1]}, "input", "strings only"),
        ({"input": [[1], "a"]}, "input", "strings only, or of token ids only"),
        ({"input": [1, "a"]}, "input", "token ids between 0 and 299"),
        ({"input": [300]}, "input", "token ids between 0 and 299, got 300"),
        ({"input": [-1]}, "input", "token ids between 0 and 299"),
        ({"input": 5}, "input", "a string"),
        ({"input": ["a"] * 601}, "input", "at most 600 texts, got a list of 601"),
        ({"input": "a", "dimensions": DIMENSIONS + 1}, "dimensions", "between 1 and 8, got 9"),
        ({"input": "a", "dimensions": 0}, "dimensions", "between 1 and 8"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float, base64"),
        ({"input": "a", "pooling": "median"}, "pooling", "one of cls, mean"),
        ({"input": "a", "truncate": "START"}, "truncate", '"END" or "NONE"'),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "above 0"),
        ({"input": "a", "truncate_prompt_tokens": 65}, "truncate_prompt_tokens", "and 64"),
        ({"input": "a", "prompt_name": "x"}, "prompt_name", "passage, query"),
        ({"input": "a", "input_type": "image"}, "input_type", "one of query"),
        ({"input": [1], "prompt_name": "query"}, "prompt_name", "token ids"),
        ({"input": "a", "prompt_name": "query", "instruction": "b"}, "prompt_name", "send one"),
        ({"input": "a", "dimension": 4}, "dimension", "the nearest is 'dimensions'"),
        ({"input": "a", "priority": "urgent"}, "priority", "high, normal, low"),
    ],
)
def test_what_is_wrong_is_said(front, body, param, message):
    response = front.post(PATH, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_another_model_is_not_found(front):
    response = front.post(PATH, {"model": "fake", "input": "a"})
    assert response.status_code == 404
    assert "'fake-embedder' does" in response.json()["error"]["message"]


def test_models_lists_both(front):
    cards = {card["id"]: card["max_model_len"] for card in front.get("/v1/models").json()["data"]}
    assert cards == {"fake": 256, "fake-embedder": 64}
    assert front.get("/v1/models/fake-embedder").json()["id"] == "fake-embedder"
    assert "'fake' and 'fake-embedder' are" in front.get("/v1/models/x").text


@pytest.mark.parametrize("token", [NOT_FINITE, NIL])
def test_what_is_no_vector_is_an_error_and_harms_no_other(front, token):
    response = front.post(PATH, {"input": [[1, 2], [token, 3]]})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "embedding_not_finite"
    assert response.headers["x-should-retry"] == "false"
    found = vectors(front.ok(PATH, {"input": [[1, 2]]}))
    np.testing.assert_allclose(found, [vector_of([1, 2])], rtol=1e-6)


def test_generation_goes_on_beside_it(front):
    async def both():
        post = front.http.post
        body = {"prompt": "abc", "seed": 5, "max_tokens": 60, "ignore_eos": True}
        alone = await post("/v1/completions", json=body)
        embed = [post(PATH, json={"input": ["t" * n for n in range(1, 50)]}) for _ in range(4)]
        together = await asyncio.gather(post("/v1/completions", json=body), *embed)
        return alone, together

    alone, (answer, *embedded) = front.run(both())
    assert answer.json()["choices"] == alone.json()["choices"]
    for response in embedded:
        assert len(vectors(response.json())) == 49


def test_a_passed_deadline(front):
    response = front.post(PATH, {"input": "a"}, headers={"x-request-deadline": "1000000000"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


def test_metrics_count_texts(front):
    def value(name: str) -> float:
        lines = front.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    before = value("jaxserve_embedded_texts_total"), value("jaxserve_embedded_tokens_total")
    front.ok(PATH, {"input": ["abc", "de"]})
    after = value("jaxserve_embedded_texts_total"), value("jaxserve_embedded_tokens_total")
    assert (after[0] - before[0], after[1] - before[1]) == (2, 5)
    assert 'route="/v1/embeddings",status="200"' in front.get("/metrics").text


def test_without_a_model_that_embeds():
    with make_front() as plain:
        for path in (PATH, "/v1/score", "/v1/rerank"):
            response = plain.post(path, {"input": "a"})
            assert response.status_code == 404
            assert "embeddings.model=minilm" in response.json()["error"]["message"]


def test_rate_limits_charge_its_tokens(tmp_path):
    http = key_config(tmp_path, {"limits": {"tokens_per_minute": 600, "burst_tokens": 100}})
    store = LocalStore(MemoryStore(lambda: 1000.0))
    config = dataclasses.replace(CONFIG, embeddings=EMBEDDINGS)
    with make_front(http, load_keys(http), config, limits=LimitsConfig(), store=store) as made:
        first = made.post(PATH, {"input": ["x" * 30, "y" * 10]}, headers=KEY)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-remaining-tokens"] == "60"
        failed = made.post(PATH, {"input": "x" * 30, "pooling": "median"}, headers=KEY)
        assert failed.status_code == 400  # what it had reserved goes back
        made.run(_settled(made))
        assert made.post(PATH, {"input": [[7] * 40, [8] * 20]}, headers=KEY).status_code == 200
        refused = made.post(PATH, {"input": [7]}, headers=KEY)
        assert refused.status_code == 429
        too_much = made.post(PATH, {"input": [[7] * 60, [8] * 60]}, headers=KEY)
        assert too_much.json()["error"]["code"] == "request_exceeds_rate_limit"
        score = made.post("/v1/score", {"text_1": "ab", "text_2": "cd"}, headers=KEY)
        assert score.status_code == 429
        free = made.post(PATH, {"input": "ab"}, headers=FREE_KEY)
        assert free.status_code == 200 and "x-ratelimit-limit-tokens" not in free.headers


class Held:
    """The fake embedder of an engine, whose steps wait for `gate`."""

    def __init__(self, front: Front) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        self.embedder = front.engine.engine._embedding._parts.embedder
        self._launch = self.embedder.launch
        self.embedder.launch = self.launch

    def launch(self, texts):
        self.entered.set()
        assert self.gate.wait(30)
        return self._launch(texts)


def test_a_client_that_leaves_ends_its_texts():
    with make_front(config=dataclasses.replace(CONFIG, embeddings=EMBEDDINGS)) as made:
        held = Held(made)

        async def leave() -> None:
            task = asyncio.create_task(made.http.post(PATH, json={"input": ["ab"] * 500}))
            await asyncio.to_thread(held.entered.wait, 30)
            task.cancel()  # httpx tells the application that the client is gone
            await asyncio.wait([task])
            held.gate.set()
            await made.client.join()

        made.run(leave())
        assert made.run(made.client.get_status()).texts_waiting == 0
        assert len(held.embedder.steps) == 1


def test_a_deadline_that_passes_meanwhile():
    with make_front(config=dataclasses.replace(CONFIG, embeddings=EMBEDDINGS)) as made:
        held = Held(made)
        response = made.post(PATH, {"input": ["ab"] * 500, "timeout": 0.1})
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        held.gate.set()
        made.run(made.client.join())
        assert len(held.embedder.steps) == 1
