"""Which texts share a step and which program holds them, for any mix of lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.device.embed_step import NO_SECOND, EmbedBuckets, EmbedInput, pack

LENGTHS = st.lists(st.integers(1, 256), min_size=1, max_size=200)


@given(LENGTHS, st.booleans(), st.sampled_from([16, 100, 256, 2048]))
def test_every_step_fits_a_program_and_takes_all_it_can(lengths, in_grid, budget):
    buckets = EmbedBuckets(256, 1024, in_grid=in_grid)
    assert len(buckets.programs) <= 12
    start = 0
    while start < len(lengths):
        room = buckets.room(min(budget, 1024))
        end = start
        while end < len(lengths) and room.add(lengths[end]):
            end += 1
        taken = lengths[start:end]
        assert taken and (len(taken) == 1 or sum(taken) <= budget)
        program = buckets.choose(taken)
        assert program.num_rows >= len(taken) and program.num_tokens >= sum(taken)
        assert program.max_len >= max(taken)
        start = end


@pytest.mark.parametrize("in_grid", [False, True])
def test_the_longest_text_has_a_program(in_grid):
    """The budget may be less than a text (TEI's issue 723 hung there)."""
    for max_length in (1, 5, 33, 256, 8192):
        buckets = EmbedBuckets(max_length, 16, in_grid=in_grid)
        assert buckets.room(16).add(max_length)
        assert buckets.choose([max_length]).num_tokens >= max_length


def test_a_grid_is_at_most_about_twice_its_tokens():
    for program in EmbedBuckets(512, 2048, in_grid=True).programs:
        assert program.num_rows * program.max_len <= 2 * program.num_tokens


def test_what_the_device_is_given():
    buckets = EmbedBuckets(64, 64, in_grid=False)
    program = buckets.choose([3, 2])
    texts = [
        EmbedInput(token_ids=[7, 8, 9], pooling=3),
        EmbedInput(token_ids=[4, 5], second_start=1),
    ]
    inputs = pack(program, texts)
    tokens, rows = program.num_tokens, program.num_rows
    assert inputs.lengths == [3, 2] and inputs.num_tokens == 5
    np.testing.assert_array_equal(inputs.packed[:6], [7, 8, 9, 4, 5, 0])
    starts = inputs.packed[tokens : tokens + rows + 1]
    np.testing.assert_array_equal(starts, [0, 3, *[5] * (rows - 1)])
    rest = inputs.packed[tokens + rows + 1 :]
    np.testing.assert_array_equal(rest[:3], [NO_SECOND, 1, NO_SECOND])
    np.testing.assert_array_equal(rest[rows : rows + 2], [3, 1])


@pytest.mark.parametrize("in_grid", [False, True])
def test_batch_invariance_has_one_program(in_grid):
    buckets = EmbedBuckets(64, 256, in_grid=in_grid, batch_invariant=True)
    (program,) = buckets.programs
    assert (program.num_tokens, program.max_len) == (256, 64)
    room = buckets.room(256)
    assert sum(room.add(64) for _ in range(9)) == 4
