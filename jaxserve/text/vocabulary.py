"""A tokenizer's vocabulary, for those who hold output to a grammar without having a tokenizer."""

from __future__ import annotations

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Vocabulary


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What each token says."""
    ids = range(tokenizer.vocab_size)
    return Vocabulary(
        tokens=tuple(map(tokenizer.token_bytes, ids)),
        special_token_ids=tuple(filter(tokenizer.is_special, ids)),
    )
