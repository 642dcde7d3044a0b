"""What a join ships, and that it lands in its slot only."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxserve.sampling import slots
from jaxserve.sampling.state import Column, Flag, init_state
from jaxserve.types import SamplingParams
from tests.sampling.rig import apply_writes

PLAIN = SamplingParams(max_tokens=5, seed=1)


def pack(*samplings: SamplingParams, max_rows: int = 64) -> slots.SlotArrays:
    writes = [
        slots.SlotSettings(slot=slot, sampling=sampling, prompt_len=4, choice=0)
        for slot, sampling in enumerate(samplings)
    ]
    return slots.pack_writes(writes, eos_token_ids=(2,), vocab_size=100, max_rows=max_rows)


def test_plain_joins_ship_little():
    arrays = pack(PLAIN, replace(PLAIN, top_p=0.5, presence_penalty=1.0))
    assert arrays.lists is None
    assert arrays.settings.nbytes < 512


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, Flag.SAMPLES),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, Flag(0)),
        ({"top_k": 100}, Flag.SAMPLES),  # the whole vocabulary
        ({"top_k": 99}, Flag.SAMPLES | Flag.TOP_K),
        ({"top_p": 0.0}, Flag.SAMPLES | Flag.TOP_P),
        ({"min_p": 1e-9}, Flag.SAMPLES | Flag.MIN_P),
        ({"frequency_penalty": -1.0}, Flag.SAMPLES | Flag.PENALTIES),
        ({"repetition_penalty": 1.1}, Flag.SAMPLES | Flag.PENALTIES),
        ({"min_tokens": 1}, Flag.SAMPLES | Flag.MIN_TOKENS),
        ({"allowed_token_ids": (99, 0, 99)}, Flag.SAMPLES | Flag.ALLOWED),
    ],
    ids=str,
)
def test_flags_say_what_is_needed(changes, flags):
    assert pack(replace(PLAIN, **changes)).settings[0, 1 + Column.FLAGS] == flags


def test_only_few_shapes_exist():
    shapes = {
        jax.tree.map(np.shape, writes)
        for writes in slots.padding_writes(vocab_size=100, max_rows=64)
    }
    biased = replace(PLAIN, logit_bias=((1, 1.0),))
    for packed in (pack(PLAIN), pack(*[PLAIN] * 9), pack(biased), pack(*[biased] * 64)):
        assert jax.tree.map(np.shape, packed) in shapes
    assert len(shapes) == 4


def test_padding_changes_nothing():
    state = apply_writes(init_state(3, 100), pack(PLAIN, max_rows=3))
    before = jax.tree.map(np.asarray, state)
    for writes in slots.padding_writes(vocab_size=100, max_rows=3):
        state = apply_writes(state, writes)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)


def test_lists_land_in_their_slot():
    full = replace(
        PLAIN,
        logit_bias=((7, -2.5), (99, 1.0)),
        bad_words=((1, 2, 3), (4,)),
        stop_token_ids=(9,),
        min_tokens=1,
        allowed_token_ids=(0, 31, 32, 99, 31),
    )
    state = apply_writes(init_state(3, 100), pack(PLAIN, full, max_rows=3))
    assert np.asarray(state.bias_ids[1])[:3].tolist() == [7, 99, 100]
    assert np.asarray(state.bias_values[1])[:3].tolist() == [-2.5, 1.0, 0.0]
    assert np.asarray(state.bad_words[1])[:3].tolist() == [
        [-1, -1, -1, -1, -1, 1, 2, 3],
        [-1, -1, -1, -1, -1, -1, -1, 4],
        [-1] * 8,
    ]
    assert np.asarray(state.end_ids[1])[:3].tolist() == [2, 9, 100]
    assert np.asarray(state.allowed[1]).tolist() == [1 + 2**31, 1, 0, 8]
    assert np.all(np.asarray(state.bias_ids[2]) == 100)


def test_settings_keep_their_bits():
    sampling = replace(PLAIN, seed=-2, temperature=1e-46, top_k=2**31 - 1, min_tokens=6)
    row = pack(sampling).settings[0, 1:]
    unsigned = row.view(np.uint32)
    assert (unsigned[Column.SEED_LOW], unsigned[Column.SEED_HIGH]) == (2**32 - 2, 2**32 - 1)
    assert row.view(np.float32)[Column.TEMPERATURE] == np.float32(slots.MIN_TEMPERATURE)
    assert row[Column.MIN_LEN] == 10


def test_writes_are_in_place():
    state = init_state(8, 4096)
    text = apply_writes.lower(state, pack(PLAIN, max_rows=8)).compile().as_text()
    assert "u16[9,4096]{1,0} copy(" not in text
