"""One array a step: every field comes back for every program, and page-table deltas keep order."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.device.packing import NO_GROUP, StepArrays, StepLayout, fill_entries
from jaxserve.device.programs import write_entries
from jaxserve.device.step import Program, StepInputs

PROGRAMS = (
    Program(num_rows=1, num_tokens=1),
    Program(num_rows=4, num_tokens=4),
    Program(num_rows=4, num_tokens=4, decode_steps=8),
    Program(num_rows=4, num_tokens=32),
    Program(num_rows=4, num_tokens=32, prompt_logprobs=True),
    Program(num_rows=4, num_tokens=32, adapters=True),
)
NUM_GROUPS, PAGE_SIZE, MAX_ROWS, COLUMNS = 2, 16, 4, 9
Entry = tuple[int, int, int, int]


@functools.cache
def layout_of(program: Program) -> StepLayout:
    """Of a model with two cache groups."""
    return StepLayout(program, num_groups=NUM_GROUPS, page_size=PAGE_SIZE)


@functools.cache
def unpack_of(program: Program) -> Callable[[np.ndarray], StepArrays]:
    """Compiled once a program."""
    return jax.jit(layout_of(program).unpack)


def inputs_of(program: Program, entries: list[Entry], seed: int = 0) -> StepInputs:
    """A step with a different number in every place."""
    rows, tokens = program.num_rows, program.num_tokens
    numbers = np.random.default_rng(seed).permutation(100_000).astype(np.int32)
    rows_, starts, lens, ids, following, _ = np.split(
        numbers, np.cumsum([rows, rows + 1, rows, tokens, tokens])
    )
    return StepInputs(
        program=program,
        rows=rows_,
        num_live_rows=rows,
        num_decode_rows=rows // 2,
        query_starts=starts,
        context_lens=lens,
        token_ids=ids,
        next_token_ids=following,
        samples=numbers[:rows] % 2 == 0,
        page_entries=entries,
        logprobs=bool(seed % 2),
        adapters=numbers[-rows:] if program.adapters else None,
    )


def unpacked(inputs: StepInputs) -> StepArrays:
    """What the program finds."""
    layout = layout_of(inputs.program)
    packed = layout.pack(inputs, logprobs=inputs.logprobs)
    assert packed.shape == (layout.size,) and packed.dtype == np.int32
    return unpack_of(inputs.program)(packed)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_field_comes_back(program: Program, seed: int) -> None:
    inputs = inputs_of(program, [(1, 2, 3, 4)], seed)
    arrays = unpacked(inputs)
    for name in ("rows", "query_starts", "context_lens", "token_ids", "samples"):
        np.testing.assert_array_equal(getattr(arrays, name), getattr(inputs, name), err_msg=name)
    assert arrays.samples.dtype == arrays.logprobs.dtype == np.bool_
    assert int(arrays.num_live_rows) == inputs.num_live_rows
    assert int(arrays.num_decode_rows) == inputs.num_decode_rows
    assert bool(arrays.logprobs) == inputs.logprobs
    if program.prompt_logprobs:
        np.testing.assert_array_equal(arrays.next_token_ids, inputs.next_token_ids)
    else:
        assert arrays.next_token_ids is None
    if program.adapters:
        np.testing.assert_array_equal(arrays.adapters, inputs.adapters)
    else:
        assert arrays.adapters is None


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_there_is_room_for_the_pages_that_a_step_may_open(program: Program) -> None:
    """Each row's tokens may begin anywhere in a page, in each group."""
    if program.is_decode:
        opened = program.num_rows * -(-program.decode_steps // PAGE_SIZE)
    else:
        opened = program.num_rows + program.num_tokens // PAGE_SIZE
    assert layout_of(program).num_entries >= NUM_GROUPS * opened


def test_padding_names_no_group() -> None:
    entries = np.asarray(unpacked(inputs_of(PROGRAMS[1], [(1, 2, 3, 4)])).entries)
    assert entries[0].tolist() == [1, 2, 3, 4]
    assert (entries[1:, 0] == NO_GROUP).all()
    tables = tuple(np.full((MAX_ROWS + 1, COLUMNS), 7, np.int32) for _ in range(NUM_GROUPS))
    first, second = jax.jit(write_entries)(tables, entries)
    np.testing.assert_array_equal(first, tables[0])
    assert np.argwhere(np.asarray(second) != 7).tolist() == [[2, 3]] and int(second[2, 3]) == 4


def test_the_last_of_several_entries_for_one_place_is_kept() -> None:
    rows = np.empty((4, 4), np.int32)
    fill_entries(rows, [(0, 1, 2, 30), (1, 1, 2, 31), (0, 1, 2, 32)])
    assert rows.tolist() == [[0, 1, 2, 32], [1, 1, 2, 31], [NO_GROUP, 0, 0, 0], [NO_GROUP, 0, 0, 0]]
    fill_entries(rows, [])
    assert (rows == [NO_GROUP, 0, 0, 0]).all()


def test_a_full_array_has_no_padding() -> None:
    layout = layout_of(PROGRAMS[1])
    exact = [(0, i % 4, i // 4, 100 + i) for i in range(layout.num_entries)]
    inputs = inputs_of(PROGRAMS[1], exact)
    assert list(layout.overflow(inputs)) == []
    assert np.asarray(unpacked(inputs).entries).tolist() == [list(entry) for entry in exact]
    inputs = inputs_of(PROGRAMS[1], [(1, 0, 0, 5), *exact])
    assert list(layout.overflow(inputs)) == [(1, 0, 0, 5)]


places = st.tuples(
    st.integers(0, NUM_GROUPS - 1), st.integers(0, MAX_ROWS - 1), st.integers(0, COLUMNS - 1)
)
_write = jax.jit(write_entries)


@given(st.lists(places, max_size=40), st.sampled_from(PROGRAMS[:2]))
def test_tables_are_as_if_entries_were_written_one_by_one(
    written: list[tuple[int, int, int]], program: Program
) -> None:
    """Whatever their number: those that overflow first, then the step's own."""
    entries = [(*place, page) for page, place in enumerate(written, 1)]
    inputs = inputs_of(program, entries)
    expected = np.zeros((NUM_GROUPS, MAX_ROWS + 1, COLUMNS), np.int32)
    for group, slot, index, page in entries:
        expected[group, slot, index] = page
    tables = tuple(jnp.zeros((MAX_ROWS + 1, COLUMNS), jnp.int32) for _ in range(NUM_GROUPS))
    overflow = np.empty((64, 4), np.int32)
    fill_entries(overflow, layout_of(program).overflow(inputs))
    tables = _write(_write(tables, overflow), unpacked(inputs).entries)
    np.testing.assert_array_equal(np.stack(tables), expected)
