"""The prefix cache in whole runs: the fake device reads every token back through page tables.

So a page that is found though it holds something else, or is written while another reads it,
gives a wrong token.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.digests import extend_digests
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.types import FinishReason
from tests.fakes.executor import FULL, sliding
from tests.fakes.rig import VOCAB, Rig

STEM = [1 + (i * i) % (VOCAB - 1) for i in range(40)]
STEADY = {"max_tokens": 6, "ignore_eos": True}


def test_a_second_request_computes_only_what_is_new():
    rig = Rig(max_step_tokens=64)
    (first,) = rig.submit([*STEM, 1], **STEADY)
    rig.run()
    positions = rig.executor.num_positions
    (second,) = rig.submit([*STEM, 2, 3], **STEADY)
    rig.run()
    rig.check()
    assert (first.num_cached, second.num_cached) == (0, 40)
    assert rig.executor.num_positions - positions == 2 + 5
    assert second.num_first_computed == 2 + 5
    prefix = rig.scheduler.prefix
    assert (prefix.num_lookup_tokens, prefix.num_hit_tokens) == (41 + 42, 40)


@pytest.mark.parametrize("end", ["commit", "cancel", "next plan"])
def test_no_plan_registers_pages_and_what_comes_next_does(end: str):
    rig = Rig(max_step_tokens=64, decode_steps=1)
    rig.submit([5], max_tokens=30, ignore_eos=True)
    rig.turn()
    (sequence,) = rig.submit([*STEM, 1], max_tokens=1)
    scheduler = rig.scheduler
    plan = scheduler.plan()
    assert plan is not None and [len(chunk.token_ids) for chunk in plan.chunks] == [41]
    assert scheduler.prefix.num_cached([*STEM, 2], sequence.root) == 0
    if end == "commit":
        scheduler.commit([0], [[7]])  # of the plan before
        assert sequence.state is SequenceState.RETIRED and scheduler.num_running == 1
    elif end == "cancel":
        scheduler.cancel(sequence, FinishReason.CANCELLED)
        assert scheduler.num_running == 1
    else:
        assert scheduler.plan() is not None
        assert scheduler.num_running == 1
    assert scheduler.prefix.num_cached([*STEM, 2], sequence.root) == 40
    assert scheduler.pages.num_kept == 10


def test_a_prompt_is_hashed_when_it_comes_and_no_plan_hashes_it(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(max_rows=8, max_step_tokens=64)
    sequences = [*rig.submit([*STEM, 1], **STEADY, n=2), *rig.submit([*STEM, 2], **STEADY)]
    assert [len(sequence.digests) for sequence in sequences] == [10, 10, 10]
    assert sequences[0].digests == sequences[2].digests
    assert sequences[0].digests is not sequences[1].digests
    hashed: list[int] = []

    def note(digests: list[bytes], *args: Any) -> None:
        before = len(digests)
        extend_digests(digests, *args)
        hashed.append(len(digests) - before)

    monkeypatch.setattr("jaxserve.scheduler.prefix.extend_digests", note)
    rig.turn()
    rig.turn()
    assert sum(hashed) == 0 and rig.scheduler.pages.num_used > 0
    rig.run()
    rig.check()
    assert sum(hashed) > 0  # what was generated


def test_an_answer_is_found_by_the_next_turn_of_the_conversation():
    rig = Rig(decode_steps=1)
    (first,) = rig.submit(STEM[:6], max_tokens=12, ignore_eos=True)
    rig.run()
    # 17 positions were run: 4 full pages, of which the last one's tokens were known at its end.
    (second,) = rig.submit([*first.token_ids, 7, 8], **STEADY)
    rig.run()
    rig.check()
    assert second.num_cached == 16


def test_what_is_cancelled_or_stopped_is_found_too():
    rig = Rig(decode_steps=1)
    (first,) = rig.submit(STEM[:6], max_tokens=40, ignore_eos=True)
    while first.num_outputs < 12:
        rig.turn()
    rig.cancel(first)
    (second,) = rig.submit([*first.token_ids, 7], **STEADY)
    rig.run()
    rig.check()
    assert second.num_cached == len(first.token_ids) // 4 * 4 == 16


def test_nobody_reads_in_a_call_what_that_call_writes():
    """Two of one prompt that join together both compute it; then they share."""
    rig = Rig(max_step_tokens=64)
    first, second = (rig.submit(STEM, **STEADY, seed=seed)[0] for seed in (1, 2))
    rig.turn()
    assert [len(chunk.token_ids) for chunk in rig.plans[0].chunks] == [40, 24]
    assert second.num_cached == 0
    rig.turn()
    # The second one's six pages were given up for the first one's, and the others were found.
    assert second.table.pages[0][:9] == first.table.pages[0][:9]
    assert second.num_cached == 36 - 24
    rig.run()
    rig.check()


def test_a_herd_of_one_prompt_computes_it_once():
    rig = Rig(max_rows=8, max_step_tokens=16, pages=60)
    for number in range(20):
        rig.submit([*STEM, number, 1], **STEADY)
    rig.run()
    rig.check()
    prompt_positions = rig.executor.num_positions - 20 * 5
    assert prompt_positions <= 40 + 20 * 6  # alone it would be 20 × 42
    hits = rig.scheduler.prefix.num_hit_tokens
    assert hits == sum(sequence.num_cached for sequence in rig.sequences)


def test_a_preempted_sequence_finds_its_own_pages():
    rig = Rig(pages=15, max_rows=2, decode_steps=1)
    old = rig.submit([7] * 4, max_tokens=30, ignore_eos=True)[0]
    young = rig.submit([8] * 4, max_tokens=30, ignore_eos=True)[0]
    rig.run()
    rig.check()
    assert old.num_preemptions == 0 and young.num_preemptions == 1
    # It was set back when the pool's 14 pages were full; what its rival took since is gone.
    assert 0 < young.num_recomputed < 20
    assert young.num_cached == 0


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"repetition_penalty": 1.2}, True),
        ({"presence_penalty": 0.5}, True),
        ({"bad_words": ((9,),)}, False),
    ],
)
def test_sampling_that_looks_back_is_told_what_was_found(sampling, told):
    """Output tokens too: presence penalties count them."""
    rig = Rig(pages=15, max_rows=2, decode_steps=1)
    rig.submit([7] * 4, max_tokens=30, ignore_eos=True)
    (young,) = rig.submit([8] * 4, max_tokens=30, ignore_eos=True, **sampling)
    rig.run()
    rig.check()
    assert young.num_preemptions
    joins = [join for plan in rig.plans for join in plan.joins if join.sampling is young.sampling]
    found = [len(join.prefix) for join in joins]
    assert found[0] == 0 and all(length > young.prompt_len for length in found[1:]) == told
    assert all(join.prefix == young.token_ids[: len(join.prefix)] for join in joins)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_only_sampling_that_does_not_look_back_catches_up_in_its_slot(penalty):
    rig = Rig(max_step_tokens=16)
    sampling = STEADY | {"repetition_penalty": penalty}
    _, second = (rig.submit([*STEM, number], **sampling)[0] for number in (1, 2))
    while second.slot < 0:  # in the third step, with the tokens that the first one leaves
        rig.turn()
    at_joining = second.num_cached
    assert at_joining == 32
    rig.run()
    rig.check()
    # Its first chunk ended within a page; what the first has computed by then it may skip.
    assert second.num_cached == (at_joining if penalty > 1 else 33)


def test_a_last_holder_does_not_write_what_can_be_found():
    """Choices one after the other: each copies the half-filled page that the first has filled."""
    rig = Rig(max_rows=1, max_step_tokens=32)
    leader, *_ = rig.submit(STEM[:6], n=3, max_tokens=6, ignore_eos=True)
    rig.run()
    assert sum(len(plan.page_copies) for plan in rig.plans) == 2
    (after,) = rig.submit([*leader.token_ids[:9]], **STEADY)
    rig.run()
    rig.check()
    assert after.num_cached == 8


def test_a_prompt_whose_logprobs_are_wanted_is_run():
    rig = Rig(max_step_tokens=64)
    rig.submit(STEM, **STEADY)
    rig.run()
    one, other = rig.submit(STEM, n=2, prompt_logprobs=1, **STEADY)
    rig.run()
    rig.check()
    assert (one.num_cached, other.num_cached) == (0, 39)
    chunks = [c for plan in rig.plans for c in plan.chunks if c.prompt_logprobs is not None]
    assert [(c.start, len(c.token_ids)) for c in chunks] == [(0, 40)]


def test_choices_share_a_prompt_that_was_found():
    rig = Rig(max_step_tokens=64, max_rows=3)
    rig.submit(STEM[:14], **STEADY)
    rig.run()
    choices = rig.submit(STEM[:14], n=3, **STEADY)
    rig.run()
    rig.check()
    assert [sequence.num_cached for sequence in choices] == [12, 13, 13]


def test_the_head_of_the_queue_holds_what_it_found_and_gives_it_up_to_running_rows():
    rig = Rig(pages=27, max_rows=3, decode_steps=1, max_step_tokens=64)
    rig.submit([*STEM[:24], 1], max_tokens=2, ignore_eos=True)
    rig.run()
    running = rig.submit([9] * 44, max_tokens=50, ignore_eos=True)[0]
    rig.turn()
    # It needs 15 of the 26 pages and one to spare, 6 of them found; the running row goes on to 24.
    head = rig.submit([*STEM[:24], *STEM[:34]], max_tokens=4, ignore_eos=True, priority=1)[0]
    rig.turn()
    assert (head.num_computed, head.slot) == (24, -1)
    waited = []
    while head.slot < 0:
        waited.append(head.num_computed)
        rig.turn()
    # Reclaimed whenever pages run out, and what has not been taken by then is found again.
    assert waited == sorted(waited, reverse=True)
    assert (waited[0], waited[-1]) == (24, 8)
    rig.run()
    rig.check()
    assert running.num_preemptions == head.num_preemptions == 0


def test_two_rows_that_wrote_the_same_answer_share_it():
    """Decoded pages are registered too; the row that comes second is told of the first one's."""
    rig = Rig(decode_steps=1, max_step_tokens=64)
    same = {"max_tokens": 20, "ignore_eos": True, "seed": 3}
    first = rig.submit(STEM[:8], **same)[0]
    second = rig.submit(STEM[:8], **same)[0]
    while first.num_outputs < 15:
        rig.turn()
    full = first.table.num_registered
    assert full >= 5 and first.table.pages[0][:full] == second.table.pages[0][:full]
    rig.run()
    rig.check()
    assert rig.emitted[first] == rig.emitted[second]


requests = st.fixed_dictionaries(
    {
        "prompt": st.tuples(
            st.integers(0, 30), st.lists(st.integers(1, 2), min_size=1, max_size=6)
        ).map(lambda parts: STEM[: parts[0]] + parts[1]),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "priority": st.integers(0, 2),
        "tenant": st.sampled_from(["", "", "a"]),
        "cache_salt": st.sampled_from(["", "", "", "a"]),
        "max_tokens": st.integers(1, 24),
        "seed": st.integers(0, 1),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "bad_words": st.sampled_from([(), (), ((3, 4),)]),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
    }
)
actions = st.one_of(
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("turn"), st.integers(1, 8)),
    st.tuples(st.just("again"), st.integers(0, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
)
worlds = st.fixed_dictionaries(
    {
        "groups": st.sampled_from(
            [(FULL,), (FULL,), (sliding(6),), (FULL, sliding(9)), (sliding(1),)]
        ),
        "page_size": st.sampled_from([1, 2, 4, 7]),
        "pages": st.sampled_from([0, 3, 12, 200]),  # beyond what the longest sequence needs alone
        "max_rows": st.integers(1, 5),
        "max_step_tokens": st.integers(5, 40),
        "decode_steps": st.sampled_from([1, 2, 5]),
        "pipelined": st.booleans(),
        "host_pages": st.sampled_from([0, 5, 100]),
        "isolation": st.sampled_from(["tenant", "none"]),
    }
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds, script=st.lists(actions, min_size=4, max_size=25))
def test_tokens_always_equal_the_oracle(world, script):
    """Shared beginnings, later turns, few pages, cancels, choices, windows: all at once."""
    needed = -(-(60 + 24) // world["page_size"]) + 1
    rig = Rig(**world | {"pages": needed + world["pages"]})

    def again(sequence: Sequence) -> None:
        """The next turn of a conversation."""
        rig.submit([*sequence.token_ids[:50], 5, 6], max_tokens=7, seed=1)

    rig.play(script, {"again": again})
    rig.run()
    rig.check()
