"""Choosing tokens: what may be drawn, how often, and that company does not matter."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxserve.sampling import blocks, draw, state
from jaxserve.sampling.sample import greedy
from jaxserve.types import SamplingParams
from tests.sampling.reference import Row, adjusted, distribution, kept
from tests.sampling.rig import Rig, adjust_rows, sample_rows
from tests.sampling.strategies import VOCAB_SIZE, rows

PLAIN = SamplingParams(max_tokens=100, seed=0)


@given(st.lists(rows(), min_size=4, max_size=4))
@settings(max_examples=200)
def test_only_kept_tokens_are_drawn(placed):
    rig = Rig(max_rows=4, vocab_size=VOCAB_SIZE)
    by_slot = dict(enumerate(placed))
    rig.join(by_slot)
    exact = rig.step(by_slot, call=adjust_rows)
    for row, got, logits in zip(placed, rig.step(by_slot), exact, strict=True):
        # on the device's own float32 logits, else near ties in float64 decide
        if row.sampling.temperature == 0:
            assert got == np.argmax(logits)
        else:
            assert kept(logits.astype(np.float64), row.sampling, slack=1e-5)[got]


@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([1, 2, 255, 256, 257, 700]))
def test_greedy_takes_the_lowest_of_the_best(seed, num_values, vocab_size):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, num_values, (3, vocab_size)).astype(np.float32) - num_values
    np.testing.assert_array_equal(greedy(logits), np.argmax(logits, axis=1))


def test_a_row_without_any_token_left_gets_some_token():
    row = Row(logits=np.full(40, -np.inf, np.float32), sampling=replace(PLAIN, top_k=3, top_p=0.5))
    rig = Rig(max_rows=1, vocab_size=40)
    rig.join({0: row})
    assert 0 <= rig.step({0: row})[0] < 40


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 2.5},
        {"temperature": 0.3},
        {"top_p": 0.7},
        {"top_p": 0.3},
        {"top_k": 4},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.5},
        {"logit_bias": ((3, 2.0), (5, -100.0)), "allowed_token_ids": (1, 3, 5, 7, 9)},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params):
    num_seeds, vocab_size = 4096, 12
    rng = np.random.default_rng(7)
    logits = rng.normal(size=vocab_size).astype(np.float32) * 1.5
    placed = {
        seed: Row(logits=logits, sampling=replace(PLAIN, seed=seed * 7919, **params), output=(3, 3))
        for seed in range(num_seeds)
    }
    rig = Rig(max_rows=num_seeds, vocab_size=vocab_size)
    rig.join(placed)
    observed = np.bincount(rig.step(placed), minlength=vocab_size)
    expected = distribution(adjusted(placed[0]), placed[0].sampling) * num_seeds
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    assert possible.sum() == 1 or (chisquare(observed[possible], expected[possible]).pvalue > 1e-3)


def test_frequencies_over_positions_and_choices_follow_the_distribution():
    vocab_size, num_choices = 100, 128
    logits = np.random.default_rng(3).normal(size=vocab_size).astype(np.float32)
    placed = {
        choice: Row(logits=logits, sampling=replace(PLAIN, seed=5, top_p=0.8), choice=choice)
        for choice in range(num_choices)
    }
    rig = Rig(max_rows=num_choices, vocab_size=vocab_size)
    rig.join(placed)
    drawn = np.stack([rig.step(placed, later=later) for later in range(60)])
    expected = distribution(logits.astype(np.float64), placed[0].sampling) * drawn.size
    observed = np.bincount(drawn.ravel(), minlength=vocab_size)
    assert observed[expected == 0].sum() == 0
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3
    # neither all choices nor all positions share a draw
    assert len({tuple(row) for row in drawn}) == 60
    assert len({tuple(column) for column in drawn.T}) == num_choices


def everything(seed: int, **changes) -> SamplingParams:
    return replace(
        PLAIN,
        seed=seed,
        temperature=1.3,
        top_k=300,
        top_p=0.95,
        min_p=1e-4,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        repetition_penalty=1.2,
        logit_bias=((1, 3.0),),
        bad_words=((1, 2),),
        **changes,
    )


@pytest.mark.parametrize("vocab_size", [517, 4096])
def test_alone_or_in_any_company_the_same_token(vocab_size):
    rng = np.random.default_rng(11)
    kinds = [
        everything(1),
        replace(PLAIN, seed=2),
        replace(PLAIN, seed=3, top_p=0.9),
        replace(PLAIN, seed=4, top_k=40, temperature=0.8),
        replace(PLAIN, seed=5, temperature=0.0),
        everything(6, allowed_token_ids=tuple(range(0, vocab_size, 2))),
        replace(PLAIN, seed=7, temperature=0.0, presence_penalty=1.0),
        replace(PLAIN, seed=8, min_p=0.02),
    ]
    every = [
        Row(
            logits=(rng.normal(size=vocab_size) * 2).astype(np.float32),
            sampling=sampling,
            prompt=rng.integers(0, vocab_size, 20).tolist(),
            output=rng.integers(0, vocab_size, 9).tolist(),
        )
        for sampling in kinds
    ]
    alone = []
    for row in every:
        rig = Rig(max_rows=1, vocab_size=vocab_size)
        rig.join({0: row})
        alone.append([int(rig.step({0: row}, later=later)[0]) for later in range(25)])
    for size, order in ((8, range(8)), (13, (3, 6, 0, 1, 7, 2, 5, 4)), (32, (5, 0, 2, 4, 3))):
        rig = Rig(max_rows=16, vocab_size=vocab_size)
        placed = {(5 * index + 1) % 16: every[index] for index in order}
        rig.join(placed)
        together = np.stack([rig.step(placed, size=size, later=later) for later in range(25)])
        for column, index in enumerate(order):
            assert together[:, column].tolist() == alone[index]


@pytest.mark.parametrize("vocab_size", [517, 4096, 49152])
def test_weights_and_their_sums_are_equal_bit_for_bit_in_every_batch_size(vocab_size):
    """Draws from sums that differ in a last bit would differ too rarely to be seen above."""
    sampling = replace(PLAIN, temperature=0.77, top_k=vocab_size // 3)

    @jax.jit
    def internals(logits, held, slots, positions, live):
        settings = state.read_settings(held, slots, live)
        weights = draw.weigh(logits, settings)
        sums = blocks.fold(weights)
        total = blocks.halve(blocks.halve(draw._in_groups(sums)))
        return jax.numpy.concatenate(
            [weights.reshape(weights.shape[0], -1), sums, total[:, None]], axis=1
        )

    rng = np.random.default_rng(0)
    every = [
        Row(logits=(rng.normal(size=vocab_size) * 3).astype(np.float32), sampling=sampling)
        for _ in range(8)
    ]
    rig = Rig(max_rows=8, vocab_size=vocab_size)
    rig.join(dict(enumerate(every)))
    alone = np.concatenate([rig.step({i: row}, call=internals) for i, row in enumerate(every)])
    for size in (8, 11):
        placed = dict(enumerate(every))
        together = rig.step(placed, size=size, call=internals)
        np.testing.assert_array_equal(together.view(np.int32), alone.view(np.int32))


def test_greedy_rows_ignore_their_neighbours_parameters():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=300).astype(np.float32)
    quiet = Row(logits=logits, sampling=replace(PLAIN, temperature=0.0))
    loud = Row(logits=logits, sampling=everything(9, allowed_token_ids=(3, 4), min_tokens=9))
    loud.eos_token_ids = quiet.eos_token_ids = (int(np.argmax(logits)),)
    rig = Rig(max_rows=2, vocab_size=300)
    rig.join({0: quiet, 1: loud})
    assert rig.step({0: quiet, 1: loud})[0] == np.argmax(logits)
    assert rig.step({0: quiet, 1: loud})[1] in (3, 4)


def test_all_64_bits_of_the_seed_count():
    seeds = [1, 1 + 2**32, 1 + 2**63, -1, -(2**63) + 1, 2**64 - 2]
    logits = np.zeros(1000, np.float32)
    placed = {
        slot: Row(logits=logits, sampling=replace(PLAIN, seed=seed))
        for slot, seed in enumerate(seeds)
    }
    rig = Rig(max_rows=6, vocab_size=1000)
    rig.join(placed)
    drawn = np.stack([rig.step(placed, later=later) for later in range(8)], axis=1)
    streams = [tuple(stream) for stream in drawn]
    assert streams[2] == streams[4]  # the same 64 bits, signed and unsigned
    assert len(set(streams)) == len(seeds) - 1


def test_unasked_features_copy_no_logits():
    """Only a branch that changes logits may copy them: greedy batches must not pay."""
    rig = Rig(max_rows=8, vocab_size=4096)
    row = np.zeros(8, np.int32)
    logits = np.zeros((8, 4096), np.float32)
    text = sample_rows.lower(logits, rig.state, row, row, row > 0).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    assert "f32[8,4096]{1,0} parameter" in entry
    assert "f32[8,4096]{1,0} copy(" not in entry
