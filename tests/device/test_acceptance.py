"""Which drafts hold: against the plainest reading, for random steps."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.device.acceptance import accept
from jaxserve.device.step import NOT_ACCEPTED

DRAFT_TOKENS, NUM_ROWS = 4, 3


@settings(max_examples=200, deadline=None)
@given(
    num_drafts=st.lists(st.integers(0, DRAFT_TOKENS), min_size=NUM_ROWS, max_size=NUM_ROWS),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_keeps_its_samples_up_to_the_first_that_no_draft_foretold(num_drafts, seed):
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *(1 + num for num in num_drafts)]).astype(np.int32)
    tokens, sampled = random.integers(0, 2, (2, NUM_ROWS * (1 + DRAFT_TOKENS))).astype(np.int32)
    got = accept(sampled, tokens, starts, DRAFT_TOKENS)
    for row, num in enumerate(num_drafts):
        start = int(starts[row])
        expected = [int(sampled[start])]
        while len(expected) <= num and expected[-1] == tokens[start + len(expected)]:
            expected.append(int(sampled[start + len(expected)]))
        padding = [NOT_ACCEPTED] * (1 + DRAFT_TOKENS - len(expected))
        assert got.token_ids[:, row].tolist() == expected + padding
        assert got.places[: len(expected), row].tolist() == list(
            range(start, start + len(expected))
        )
        assert int(got.last[row]) == expected[-1]
