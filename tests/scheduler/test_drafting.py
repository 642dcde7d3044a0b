"""Speculation over the fake executor: the oracle's tokens, in fewer calls, whatever happens."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.types import FinishReason
from tests.fakes.batch import ComparedBatch, DoublingShapes, ExactBatch
from tests.fakes.executor import ECHO, FULL, sliding
from tests.fakes.rig import VOCAB, Rig

#: Repeats itself, but for a surprise now and then.
ECHOING = {"top_k": ECHO, "ignore_eos": True}


def drafting(rig: Rig, **sampling) -> Sequence:
    """A sequence that has come to draft, and has a verification in flight."""
    (sequence,) = rig.submit([5, 6, 7, 8, 9] * 4, **{"max_tokens": 120, **ECHOING} | sampling)
    for _ in range(200):
        rig.turn()
        if (
            sequence.state is SequenceState.DRAFTING
            and sequence.has_unread
            and rig.plans[-1].chunks
        ):
            return sequence
    raise AssertionError("it never drafts")


def test_a_row_that_repeats_itself_takes_several_tokens_a_call():
    rig = Rig(draft_tokens=7, decode_steps=1)
    (sequence,) = rig.submit([5, 6, 7, 8, 9], max_tokens=100, **ECHOING)
    rig.run()
    rig.check()
    assert sequence.num_drafted > sequence.num_kept > 50
    assert rig.executor.num_accepted >= sequence.num_kept
    assert len(rig.executor.calls) < 60


def test_without_drafts_each_token_takes_a_step():
    rig = Rig(draft_tokens=0, decode_steps=1)
    (sequence,) = rig.submit([5, 6, 7, 8, 9], max_tokens=100, **ECHOING)
    rig.run()
    rig.check()
    assert sequence.num_drafted == 0 and len(rig.executor.calls) == 100


def test_text_that_does_not_repeat_is_never_drafted():
    rig = Rig(draft_tokens=7)
    (sequence,) = rig.submit([5, 6, 7, 8, 9], max_tokens=100, ignore_eos=True)
    rig.run()
    rig.check()
    assert sequence.num_drafted == 0
    assert max(plan.decode_steps for plan in rig.plans) == 4


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"bad_words": ((3, 4),)},
    ],
)
def test_rows_whose_sampling_looks_back_do_not_draft(sampling):
    rig = Rig(draft_tokens=7)
    (sequence,) = rig.submit([5, 6, 7, 8, 9], max_tokens=60, **ECHOING, **sampling)
    rig.run()
    rig.check()
    assert sequence.num_drafted == 0


@pytest.mark.parametrize("max_tokens", range(20, 30))
def test_max_tokens_bound_the_drafts(max_tokens):
    rig = Rig(draft_tokens=7, decode_steps=1)
    (sequence,) = rig.submit([5, 6, 7, 8, 9] * 4, max_tokens=max_tokens, **ECHOING)
    rig.run()
    rig.check()
    assert len(rig.emitted[sequence]) == max_tokens
    assert sequence.num_drafted > 0
    for plan in rig.plans:
        for chunk in plan.chunks:
            assert chunk.start + len(chunk.token_ids) < 20 + max_tokens


def test_a_stop_token_within_accepted_drafts_ends_the_sequence_there():
    rig = Rig(draft_tokens=7, decode_steps=1)
    (probe,) = rig.submit([5, 6, 7, 8, 9] * 4, max_tokens=60, **ECHOING)
    rig.run()
    tokens = rig.emitted[probe]
    for stop in sorted(set(tokens[10:])):
        (sequence,) = rig.submit(
            [5, 6, 7, 8, 9] * 4, max_tokens=60, stop_token_ids=(stop,), **ECHOING
        )
        rig.run()
        assert rig.emitted[sequence] == tokens[: tokens.index(stop)]
        assert sequence.stop_token_id == stop and sequence.reason is FinishReason.STOP
    rig.check()
    assert any(
        sequence.num_discarded and sequence.num_drafted > sequence.num_kept
        for sequence in rig.sequences[1:]
    )


def test_a_prompt_that_arrives_is_not_held_up_by_drafts():
    rig = Rig(draft_tokens=7)
    sequence = drafting(rig)
    (late,) = rig.submit([1, 2, 3], max_tokens=4, ignore_eos=True)
    rig.turn()
    assert [chunk.slot for chunk in rig.plans[-1].chunks] == [late.slot]
    rig.turn()
    assert sequence.state is SequenceState.DECODING
    rig.run()
    rig.check()


def test_more_rows_than_draft_rows_do_not_draft():
    rig = Rig(draft_tokens=3, draft_rows=2, max_rows=3)
    for seed in range(3):
        rig.submit([5, 6, 7, 8, 9] * 2, max_tokens=40 * (1 + seed), seed=seed, **ECHOING)
    rig.run()
    rig.check()
    drafted = [s.num_drafted for s in rig.sequences]
    assert drafted[0] == 0 and drafted[2] > 0


def test_a_drafting_row_is_cancelled_at_once_and_what_it_drafted_is_discarded():
    rig = Rig(draft_tokens=7)
    sequence = drafting(rig)
    num_outputs = sequence.num_outputs
    rig.cancel(sequence)
    assert rig.scheduler.pages.num_used == 0
    rig.run()
    rig.check()
    assert sequence.num_outputs == num_outputs and sequence.num_discarded > 1


@pytest.mark.parametrize("host_pages", [0, 100])
def test_a_drafting_row_is_set_back_and_its_verified_tokens_are_kept(host_pages):
    rig = Rig(draft_tokens=7, host_pages=host_pages)
    sequence = drafting(rig)
    num_outputs = sequence.num_outputs
    rig.set_back(sequence)
    rig.turn()
    assert sequence.state is SequenceState.WAITING
    assert sequence.num_outputs > num_outputs + 1
    rig.run()
    rig.check()
    assert sequence.num_preemptions == 1


def test_drafts_do_not_set_others_back():
    rig = Rig(draft_tokens=7, pages=44, page_size=4, max_rows=2)
    for seed in range(2):
        rig.submit([5, 6, 7, 8, 9] * 4, max_tokens=64, seed=seed, **ECHOING)
    rig.run()
    rig.check()
    assert rig.scheduler.num_preemptions == 0
    assert all(sequence.num_drafted for sequence in rig.sequences)


def test_rows_go_on_decoding_where_no_page_is_free_for_drafts():
    """Each position is a page, and those that are free are not enough for both rows."""
    rig = Rig(draft_tokens=7, pages=75, page_size=1, max_rows=2, decode_steps=1)
    for seed in range(2):
        rig.submit([5, 6, 7, 8, 9] * 2, max_tokens=27, seed=seed, **ECHOING)
    rig.run(limit=100)
    rig.check()
    drafted = [c.num_drafts for plan in rig.plans for c in plan.chunks if c.num_drafts]
    assert 0 < min(drafted) < 7


requests = st.fixed_dictionaries(
    {
        "prompt": st.one_of(
            st.lists(st.integers(1, 4), min_size=1, max_size=30),
            st.lists(st.integers(1, VOCAB - 1), min_size=5, max_size=8).map(lambda x: x * 3),
        ),
        "n": st.integers(1, 3),
        "priority": st.integers(0, 2),
        "max_tokens": st.integers(1, 60),
        "seed": st.integers(0, 3),
        "top_k": st.sampled_from([0, ECHO, ECHO, ECHO]),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "bad_words": st.sampled_from([(), ((3,),), ((3, 4),)]),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
    }
)
actions = st.one_of(
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("set back"), st.integers(0, 30)),
    st.tuples(st.just("turn"), st.integers(1, 30)),
)
worlds = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([(FULL,), (sliding(6),), (FULL, sliding(9))]),
        "page_size": st.sampled_from([1, 3, 4, 16]),
        "pages": st.sampled_from([0, 12, 400]),  # beyond what the longest sequence needs alone
        "host_pages": st.sampled_from([0, 200]),
        "max_rows": st.integers(1, 5),
        "max_step_tokens": st.integers(8, 60),
        "decode_steps": st.sampled_from([1, 2, 5]),
        "draft_tokens": st.sampled_from([1, 3, 7]),
        "draft_rows": st.integers(1, 5),
        "pipelined": st.booleans(),
    }
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds, script=st.lists(actions, min_size=3, max_size=20), times=st.integers(0, 3))
def test_tokens_always_equal_the_oracle(world, script, times):
    needed = -(-(30 + 60) // world["page_size"]) + 1
    rig = Rig(**world | {"pages": needed + world["pages"]})
    for action, value in script:
        if action == "submit":
            rig.submit(**value)
        elif action == "cancel" and rig.sequences:
            rig.cancel(rig.sequences[value % len(rig.sequences)])
        elif action == "set back" and rig.sequences:
            sequence = rig.sequences[value % len(rig.sequences)]
            if sequence.state in (SequenceState.DECODING, SequenceState.DRAFTING):
                rig.set_back(sequence)
        elif action == "turn":
            for _ in range(value):
                rig.turn()
        # Whatever steps are told to take, tokens are the same.
        rig.scheduler.measured(1 + times, 100.0, verifies=False)
        rig.scheduler.measured(2 + times, 100.0 * times, verifies=True)
    rig.run()
    rig.check()


def run_script(rng: random.Random) -> Rig:
    """A crowded engine: requests of all kinds, cancels, rows set back, steps that take any time."""
    page_size = rng.choice([1, 3, 4, 16])
    rig = Rig(
        groups=rng.choice([(FULL,), (sliding(6),), (FULL, sliding(9))]),
        page_size=page_size,
        pages=-(-90 // page_size) + rng.choice([2, 12, 300]),
        host_pages=rng.choice([0, 200]),
        max_rows=rng.randint(1, 5),
        max_step_tokens=rng.randint(8, 60),
        decode_steps=rng.choice([1, 2, 5]),
        draft_tokens=rng.choice([1, 3, 7]),
        draft_rows=rng.randint(1, 5),
        pipelined=rng.random() < 0.8,
        batch=rng.choice([ExactBatch(), ComparedBatch(DoublingShapes(), 5)]),
    )
    for _ in range(rng.randint(1, 8)):
        period = rng.randint(3, 8)
        rig.submit(
            [rng.randint(1, VOCAB - 1) for _ in range(period)] * rng.randint(1, 3),
            n=rng.choice([1, 1, 1, 3]),
            priority=rng.randint(0, 2),
            max_tokens=rng.randint(1, 60),
            seed=rng.randint(0, 3),
            top_k=rng.choice([0, ECHO, ECHO, ECHO]),
            ignore_eos=rng.random() < 0.8,
            repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1]))),
        )
        for _ in range(rng.randint(0, 25)):
            rig.turn()
            rig.scheduler.measured(rng.randint(1, 8), rng.randint(50, 150), verifies=False)
            rig.scheduler.measured(rng.randint(2, 20), rng.randint(50, 300), verifies=True)
            sequence = rng.choice(rig.sequences)
            if rng.random() < 0.04:
                rig.cancel(sequence)
            elif sequence.state is SequenceState.DRAFTING and rng.random() < 0.1:
                rig.set_back(sequence)
    rig.run()
    rig.check()
    return rig


def test_tokens_always_equal_the_oracle_in_a_thousand_crowds():
    drafted = kept = set_back = 0
    for seed in range(1000):
        rig = run_script(random.Random(seed))
        drafted += sum(sequence.num_drafted for sequence in rig.sequences)
        kept += sum(sequence.num_kept for sequence in rig.sequences)
        set_back += sum(s.num_preemptions for s in rig.sequences if s.num_drafted)
    assert drafted > kept > 5000 and set_back > 200  # else this would test nothing
