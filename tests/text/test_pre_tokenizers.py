"""Where text is cut before merging, by GGUF's names for it."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import models

from jaxserve.errors import WeightsError
from jaxserve.text.pre_tokenizers import pre_tokenizing

TEXT = "I'LL don't 12345 x1\n\n  two  café()/\n end  "


def cut(name: str, text: str) -> list[str]:
    backend = tokenizers.Tokenizer(models.BPE())
    pre_tokenizing(name).apply(backend)
    assert backend.pre_tokenizer is not None
    return [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gpt-2", "I|'|LL| don|'t| 12345| x|1|\n\n | two| | café|()/|\n| end|  "),
        ("smollm", "I|'|LL| don|'t| |1|2|3|4|5| x|1|\n\n | two| | café|()/|\n| end|  "),
        ("llama-bpe", "I|'LL| don|'t| |123|45| x|1|\n\n| | two| | café|()/\n| end|  "),
        ("qwen2", "I|'LL| don|'t| |1|2|3|4|5| x|1|\n\n| | two| | café|()/\n| end|  "),
        ("tekken", "I|'LL| don|'t| |1|2|3|4|5| x|1|\n\n| | two| | café|()/\n| end|  "),
    ],
)
def test_cuts(name: str, wanted: str) -> None:
    assert cut(name, TEXT) == wanted.split("|")


def test_tekken_cuts_at_changes_of_case_and_keeps_a_slash_with_line_ends() -> None:
    assert cut("tekken", "camelCase HTTPServer ;\n/x") == [
        "camel", "Case", " HTTPServer", " ;\n/", "x",
    ]  # fmt: skip


def test_qwen2_composes_characters() -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    pre_tokenizing("qwen2").apply(backend)
    assert backend.normalizer is not None
    assert backend.normalizer.normalize_str("e\u0301") == "é"


def test_whole_words_are_not_merged_where_the_model_says_so() -> None:
    assert pre_tokenizing("llama-bpe").whole_words and not pre_tokenizing("qwen2").whole_words
    assert pre_tokenizing("llama-bpe").add_bos and not pre_tokenizing("smollm").add_bos


def test_an_unknown_name_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(WeightsError, match=r"'nonsense' is not known here .*model\.tokenizer"):
        pre_tokenizing("nonsense")
