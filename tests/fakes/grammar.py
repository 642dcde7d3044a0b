"""Grammars over the fake vocabulary, and what they admit, found without the engine's own matchers.

The vocabulary is the bytes, but for the fake engine's end token, which is 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher

from jaxserve.structured.matcher import _source
from jaxserve.structured.table import token_table
from jaxserve.text.vocabulary import vocabulary_of
from jaxserve.types import Grammar, Vocabulary
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.tokenizer import ByteTokenizer


def vocabulary() -> Vocabulary:
    """Of `ByteTokenizer`."""
    return vocabulary_of(ByteTokenizer(VOCAB_SIZE))


TABLE = token_table(vocabulary(), VOCAB_SIZE, (EOS,))


def allowed_by(
    grammar: Grammar, stop_token_ids: tuple[int, ...] = ()
) -> Callable[[list[int]], list[int]]:
    """The tokens that may follow an output, ascending: a matcher of its own, from the beginning.

    Args:
        stop_token_ids: come where the grammar may end, and only there.
    """

    def allowed(output: list[int]) -> list[int]:
        matcher = LLMatcher(TABLE, _source(grammar), log_level=0)
        assert matcher.consume_tokens(output) or not output, matcher.get_error()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[:VOCAB_SIZE]
        bits[list(stop_token_ids)] = bits[EOS]
        return np.flatnonzero(bits).tolist()

    return allowed


def text_of(output: list[int]) -> str:
    """What an output says."""
    return ByteTokenizer(VOCAB_SIZE).decode(output)
