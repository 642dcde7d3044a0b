"""Penalties, biases and masks against the float64 reference."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.sampling.adjust import RULED_OUT
from jaxserve.types import SamplingParams
from tests.sampling.reference import Row, adjusted
from tests.sampling.rig import Rig, adjust_rows
from tests.sampling.strategies import VOCAB_SIZE, rows


def without_infinity(logits: np.ndarray) -> np.ndarray:
    """A model's own -inf becomes some huge number below RULED_OUT; neither has a probability."""
    return np.maximum(logits, 10 * RULED_OUT)


@given(st.lists(rows(), min_size=4, max_size=4))
@settings(max_examples=150)
def test_equals_the_reference_whatever_the_neighbours(placed):
    rig = Rig(max_rows=6, vocab_size=VOCAB_SIZE)
    by_slot = dict(zip((5, 0, 3, 2), placed, strict=True))
    rig.join(by_slot)
    result = rig.step(by_slot, size=8, call=adjust_rows)
    for row, got in zip(placed, result, strict=True):
        np.testing.assert_allclose(
            without_infinity(got), without_infinity(adjusted(row)), rtol=1e-5, atol=1e-5
        )
        if row.sampling.allowed_token_ids is not None:
            assert np.all(np.isneginf(np.delete(got, row.sampling.allowed_token_ids)))


def sharp(**params) -> Row:
    logits = np.linspace(-1, 1, 10).astype(np.float32)
    return Row(logits=logits, sampling=SamplingParams(max_tokens=9, seed=0, **params))


def next_token(row: Row) -> int:
    rig = Rig(max_rows=1, vocab_size=10)
    rig.join({0: row})
    return int(rig.step({0: row})[0])


def test_bad_word_is_ruled_out_only_behind_its_prefix():
    row = sharp(temperature=0.0, bad_words=((3, 4, 9),))
    row.prompt, row.output = [3], [4]  # across the border of prompt and output
    assert next_token(row) == 8
    row.prompt, row.output = [4], [3]
    assert next_token(row) == 9
    row.prompt, row.output = [4], []  # a history shorter than the prefix
    assert next_token(row) == 9


def test_longest_bad_word_matches_all_of_its_prefix():
    word = (1, 2, 3, 4, 5, 6, 7, 9)
    row = sharp(temperature=0.0, bad_words=(word,))
    row.prompt = [8, 8, 1, 2, 3, 4, 5, 6, 7]
    assert next_token(row) == 8
    row.prompt = [8, 8, 0, 2, 3, 4, 5, 6, 7]
    assert next_token(row) == 9


def test_end_tokens_are_ruled_out_until_min_tokens():
    row = sharp(temperature=0.0, min_tokens=2, stop_token_ids=(8,))
    row.eos_token_ids = (9,)
    row.output = [0]
    assert next_token(row) == 7
    row.output = [0, 0]
    assert next_token(row) == 9


def test_bans_yield_to_allowed_tokens_when_nothing_else_is_left():
    row = sharp(temperature=0.7, allowed_token_ids=(9,), min_tokens=2)
    row.eos_token_ids = (9,)
    assert next_token(row) == 9
    row = sharp(temperature=0.7, allowed_token_ids=(3, 9), bad_words=((9,),))
    assert next_token(row) == 3


def test_ruled_out_has_no_probability_at_the_largest_temperature():
    row = sharp(temperature=1e6, allowed_token_ids=tuple(range(10)), bad_words=((9,),))
    rig = Rig(max_rows=1, vocab_size=10)
    rig.join({0: row})
    assert rig.step({0: row}, call=adjust_rows)[0, 9] == np.float32(RULED_OUT)
    drawn = {int(rig.step({0: row}, later=later)[0]) for later in range(200)}
    assert drawn == set(range(9))
