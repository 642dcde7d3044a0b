"""A step's masks are the same whoever makes them: the caller's thread, or several."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.config import StructuredConfig
from jaxserve.structured import grammars
from jaxserve.structured.constraint import Constraint
from jaxserve.structured.masks import MaskedRow, MaskMaker
from jaxserve.structured.matcher import compile_grammar
from jaxserve.types import Grammar, ModelInfo, SamplingParams
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import TABLE

DIGITS = grammars.regex("[0-9]{3,6}")
NUM_WORDS = -(-VOCAB_SIZE // 32)
MODEL = ModelInfo(
    name="bytes", max_context=64, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), cache_groups=()
)


def row(grammar: Grammar, place: int, text: bytes, draft: bytes = b"") -> MaskedRow:
    """One whose output is this text."""
    compiled = compile_grammar(grammar, TABLE, StructuredConfig(), VOCAB_SIZE)
    constraint = Constraint(compiled, SamplingParams(max_tokens=50, seed=0), list(text), 0, MODEL)
    return MaskedRow(constraint, place, list(draft))


def allowed(mask: np.ndarray) -> bytes:
    """The tokens, which are bytes."""
    return bytes(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("threads", [1, 3])
def test_each_row_has_the_mask_of_its_own_place(threads: int) -> None:
    maker = MaskMaker(threads, VOCAB_SIZE)
    rows = [row(DIGITS, 3, b"12"), row(grammars.regex("ab?c"), 0, b"a"), row(DIGITS, 1, b"123456")]
    masks, failed = maker.make(rows, 5)
    assert not failed and masks.shape == (5, NUM_WORDS)
    assert allowed(masks[3]) == b"0123456789"
    assert allowed(masks[0]) == b"bc"
    assert allowed(masks[1]) == bytes([EOS]), "six digits are all"
    assert (masks[[2, 4]] == 0xFFFF_FFFF).all(), "where nobody is, nothing is ruled out"


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_that_cannot_go_on_fails_alone(threads: int) -> None:
    maker = MaskMaker(threads, VOCAB_SIZE)
    rows = [row(DIGITS, 0, b"12"), row(DIGITS, 1, b""), row(DIGITS, 2, b"7")]
    assert not rows[1].constraint.matcher.ll.consume_tokens(list(b"x"))
    masks, failed = maker.make(rows, 3)
    assert [index for index, _ in failed] == [1]
    assert "cannot be held to its grammar" in failed[0][1].message
    assert (masks[1] == 0xFFFF_FFFF).all()
    assert allowed(masks[0]) == allowed(masks[2]) == b"0123456789"


@pytest.mark.parametrize("threads", [1, 3])
def test_drafts_have_masks_behind_their_row_s(threads: int) -> None:
    maker = MaskMaker(threads, VOCAB_SIZE)
    masks, failed = maker.make(
        [row(grammars.regex("abcd|abce"), 1, b"", b"abc"), row(DIGITS, 0, b"12")], 5
    )
    assert not failed
    assert [allowed(mask) for mask in masks] == [b"0123456789", b"a", b"b", b"c", b"de"]
