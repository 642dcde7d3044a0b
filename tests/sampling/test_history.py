"""Tokens entering in chunks, again after a preemption, or as a shared prefix: the same history."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sampling.state import MAX_COUNT, PROMPT_BIT
from jaxserve.types import SamplingParams
from tests.sampling.reference import Row
from tests.sampling.rig import Rig, observe

VOCAB_SIZE = 20
LOOKING_BACK = SamplingParams(max_tokens=9, seed=0, presence_penalty=1.0, bad_words=((1, 2),))


def row(prompt, sampling=LOOKING_BACK) -> Row:
    return Row(logits=np.zeros(VOCAB_SIZE, np.float32), sampling=sampling, prompt=prompt)


def history(rig: Rig, slot: int):
    return np.asarray(rig.state.counts[slot]), np.asarray(rig.state.recent[slot])


@given(st.data())
def test_chunks_give_the_history_of_the_whole(data):
    tokens = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=40))
    prompt_len = data.draw(st.integers(1, len(tokens)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens) - 1), max_size=5)))
    sequence = row(tokens[:prompt_len])
    rig = Rig(max_rows=3, vocab_size=VOCAB_SIZE)
    rig.join({1: sequence}, feed=False)
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        rig.feed({1: tokens[start:end]}, start=start, padding=data.draw(st.integers(0, 3)))
    counts, recent = history(rig, 1)
    output = np.bincount(tokens[prompt_len:], minlength=VOCAB_SIZE)
    in_prompt = np.isin(np.arange(VOCAB_SIZE), tokens[:prompt_len])
    np.testing.assert_array_equal(counts, output + PROMPT_BIT * in_prompt)
    last = [-1] * 8
    for position, token in enumerate(tokens):
        last[position % 8] = token
    assert recent.tolist() == last
    assert not np.any(history(rig, 0)[0]) and not np.any(history(rig, 3)[0])


def test_rows_of_one_step_do_not_mix():
    rig = Rig(max_rows=4, vocab_size=VOCAB_SIZE)
    rig.join({0: row([1] * 9), 2: row([5] * 3), 3: row([7] * 12)})
    assert [np.flatnonzero(history(rig, slot)[0]).tolist() for slot in range(4)] == [
        [1], [], [5], [7],
    ]  # fmt: skip
    assert history(rig, 2)[1].tolist() == [5, 5, 5, -1, -1, -1, -1, -1]
    assert history(rig, 3)[1].tolist() == [7] * 8


def test_a_slot_taken_again_starts_without_history():
    rig = Rig(max_rows=2, vocab_size=VOCAB_SIZE)
    rig.join({0: row([1, 2, 3])})
    rig.join({0: row([4])})
    counts, recent = history(rig, 0)
    assert np.flatnonzero(counts).tolist() == [4]
    assert recent.tolist() == [4, *[-1] * 7]


def test_recomputed_output_counts_as_output():
    sequence = replace(row([1, 2]), output=[3, 3])
    rig = Rig(max_rows=1, vocab_size=VOCAB_SIZE)
    rig.join({0: sequence})
    before = history(rig, 0)
    rig.join({0: sequence}, feed=False)
    rig.feed({0: [1, 2, 3, 3]})  # in one chunk now
    np.testing.assert_array_equal(history(rig, 0)[0], before[0])
    assert history(rig, 0)[0][3] == 2


def test_rows_that_do_not_look_back_are_not_tracked():
    rig = Rig(max_rows=2, vocab_size=VOCAB_SIZE)
    rig.join({0: row([1, 2], SamplingParams(max_tokens=9, seed=0)), 1: row([3])})
    assert not np.any(history(rig, 0)[0])
    assert history(rig, 0)[1].tolist() == [-1] * 8


def test_counts_stop_before_they_reach_the_prompt_bit():
    rig = Rig(max_rows=1, vocab_size=VOCAB_SIZE)
    rig.join({0: row([5])})
    many = MAX_COUNT - 3
    rig.feed({0: [4] * many}, start=1)
    assert history(rig, 0)[0][4] == many
    rig.feed({0: [4] * many}, start=1 + many)
    assert history(rig, 0)[0][4] == MAX_COUNT


def test_history_is_updated_in_place():
    rig = Rig(max_rows=8, vocab_size=4096)
    tokens = np.zeros(16, np.int32)
    compiled = observe.lower(rig.state, tokens, tokens, tokens, tokens > 0).compile()
    assert "u16[9,4096]{1,0} copy(" not in compiled.as_text()
