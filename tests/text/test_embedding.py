"""Texts for an encoder: special tokens, pairs, cutting, prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jaxserve.config import EmbeddingsConfig
from jaxserve.errors import InvalidRequest, WeightsError
from jaxserve.formats.sentence_files import SentenceFiles
from jaxserve.text.embedding import (
    EmbeddingText,
    EncoderTokenizer,
    ServedTokenizer,
    groups_of,
    load_embedding_text,
)
from tests.fakes.tokenizer import ByteTokenizer

CLS, SEP, A, B, C = range(5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with a tiny tokenizer that was saved with padding and truncation on."""
    vocab = {"[CLS]": CLS, "[SEP]": SEP, "a": A, "b": B, "c": C}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="c"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    backend.enable_padding(length=20)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tokenizer(directory: Path) -> EncoderTokenizer:
    return EncoderTokenizer(directory / "tokenizer.json")


def test_special_tokens_stand_around_and_nothing_is_padded(tokenizer):
    found = tokenizer.encode(["a b", "", "c c c c c"], None)
    assert [text.ids for text in found] == [[CLS, A, B, SEP], [CLS, SEP], [CLS, *[C] * 5, SEP]]
    assert [text.num_before for text in found] == [4, 2, 7]


def test_cutting_keeps_the_special_tokens(tokenizer):
    long = "a b c " * 10
    for limit, inner in ((32, [A, B, C] * 10), (5, [A, B, C]), (3, [A]), (2, [])):
        (text,) = tokenizer.encode([long], limit)
        assert text.ids == [CLS, *inner, SEP] and text.num_before == 32
    assert len(tokenizer.encode([long], 1)[0].ids) == 1


def test_pairs(tokenizer):
    (pair,) = tokenizer.encode_pairs([("a a", "b")], None)
    assert pair.ids == [CLS, A, A, SEP, B, SEP] and pair.second_start == 4
    (pair,) = tokenizer.encode_pairs([("a", "")], None)
    assert pair.ids == [CLS, A, SEP, SEP] and pair.second_start == 3


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [(9, 2, 6, (4, 2)), (2, 9, 6, (2, 4)), (9, 9, 6, (3, 3)), (9, 9, 7, (3, 4)), (9, 8, 7, (4, 3))],
)
def test_of_a_pair_the_longer_text_is_cut(tokenizer, first, second, room, kept):
    """As transformers' longest_first."""
    pair = ("a " * first, "b " * second)
    (text,) = tokenizer.encode_pairs([pair], room + 3)
    assert text.ids == [CLS, *[A] * kept[0], SEP, *[B] * kept[1], SEP]
    assert text.second_start == kept[0] + 2 and text.num_before == first + second + 3


def test_a_model_may_want_lower_case(directory):
    file = directory / "tokenizer.json"
    assert EncoderTokenizer(file).encode(["A B"], None)[0].ids == [CLS, C, C, SEP]  # unknown
    lowering = EncoderTokenizer(file, lower_case=True)
    assert lowering.encode(["A B"], None)[0].ids == [CLS, A, B, SEP]
    (directory / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    loaded = load_embedding_text(EmbeddingsConfig(model=str(directory)), ByteTokenizer())
    assert loaded is not None
    assert loaded.tokenizer.encode(["A b"], None)[0].ids == [CLS, A, B, SEP]


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        tokenizer.encode(["fine", "\ud800"], None)


def test_the_generating_models_tokenizer():
    served = ServedTokenizer(ByteTokenizer(add_bos=True))
    assert [text.ids for text in served.encode(["ab", ""], None)] == [[256, 97, 98], [256]]
    assert served.encode(["abc"], 2)[0].ids == [256, 97]
    with pytest.raises(InvalidRequest, match="scores no pairs"):
        served.encode_pairs([("a", "b")], None)


def test_prompts_by_name_and_by_side():
    files = SentenceFiles(prompts={"passage": "p: ", "s2s": "s: "}, default_prompt="s2s")
    text = EmbeddingText(ServedTokenizer(ByteTokenizer()), files, query_prefix="q: ")
    assert [text.prefix(name) for name in (None, "passage", "query")] == ["s: ", "p: ", "q: "]
    assert text.side_prefix(is_query=True) == "q: " and text.side_prefix(is_query=False) == "p: "
    with pytest.raises(InvalidRequest, match="it has: passage, query, s2s"):
        text.prefix("clustering")
    plain = EmbeddingText(ServedTokenizer(ByteTokenizer()), SentenceFiles())
    assert plain.prefix(None) == plain.side_prefix(is_query=True) == ""
    own = SentenceFiles(prompts={"query": "own: "})
    kept = EmbeddingText(ServedTokenizer(ByteTokenizer()), own, query_prefix="q: ")
    assert kept.prefix("query") == "own: "  # the model's own comes first


def test_loading(directory, tmp_path):
    served = ByteTokenizer()
    assert load_embedding_text(EmbeddingsConfig(), served) is None
    found = load_embedding_text(EmbeddingsConfig(model=str(directory)), served)
    assert found is not None and isinstance(found.tokenizer, EncoderTokenizer)
    found = load_embedding_text(EmbeddingsConfig(model="served"), served)
    assert found is not None and isinstance(found.tokenizer, ServedTokenizer)
    with pytest.raises(WeightsError, match=r"has no tokenizer\.json"):
        load_embedding_text(EmbeddingsConfig(model=str(tmp_path / "none")), served)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot read the tokenizer"):
        load_embedding_text(EmbeddingsConfig(model=str(directory)), served)


def test_groups_are_of_similar_lengths(tokenizer):
    texts = tokenizer.encode(["a " * n for n in (1, 9, 3, 7, 5)], None)
    assert list(groups_of(texts, 2)) == [[1, 3], [4, 2], [0]]
    assert not groups_of([], 2)
