"""Grammars that compile and soon pass a limit; and that what does not is let through."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError
from jaxserve.structured import grammars
from jaxserve.structured.matcher import Compiled, compile_grammar
from jaxserve.structured.probe import probe
from jaxserve.structured.table import token_table
from jaxserve.types import Grammar
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import vocabulary


def compiled(grammar: Grammar) -> Compiled:
    table = token_table(vocabulary(), VOCAB_SIZE, (EOS,))
    return compile_grammar(grammar, table, StructuredConfig(), VOCAB_SIZE)


def test_one_that_passes_a_limit_after_some_tokens() -> None:
    with pytest.raises(
        GrammarError, match="too complex .* tokens, lexer error: too many"
    ) as caught:
        probe(compiled(grammars.regex("[a-z](a|aa|aaa){200}")), VOCAB_SIZE)
    assert caught.value.message.endswith("send a simpler one")


@pytest.mark.parametrize(
    "grammar",
    [
        grammars.regex("ab?"),
        grammars.regex(".*"),
        grammars.regex("[a-z]{1000}"),
        grammars.choice(["yes", "no"]),
        grammars.json_object(),
        grammars.context_free('root ::= "a" root | "b"'),
    ],
)
def test_others_pass_and_are_left_as_they_were(grammar: Grammar) -> None:
    own = compiled(grammar)
    probe(own, VOCAB_SIZE)
    masks = np.zeros((2, VOCAB_SIZE // 32), np.uint32)
    for mask, one in zip(masks, (own, compiled(grammar)), strict=True):
        one.matcher().ll.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    assert masks[0].any() and (masks[0] == masks[1]).all()


def test_a_slow_one_is_not_looked_at_for_long() -> None:
    own = compiled(grammars.regex("a{100000}"))
    begun_s = time.thread_time()
    probe(own, VOCAB_SIZE)
    assert time.thread_time() - begun_s < 1.0
