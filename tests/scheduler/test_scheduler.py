"""The scheduler over the fake executor: whatever happens, tokens equal the history oracle."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import ContextTooLong, OutOfPages, Overloaded
from jaxserve.scheduler.sequence import SequenceState
from tests.fakes.executor import FULL, sliding
from tests.fakes.rig import VOCAB, Rig


def test_one_sequence_follows_the_oracle_and_pages_return():
    rig = Rig()
    (sequence,) = rig.submit([5, 6, 7, 8, 9], max_tokens=20, ignore_eos=True)
    rig.run()
    rig.check()
    assert len(rig.emitted[sequence]) == 20
    assert rig.plans[0].chunks[0].token_ids == [5, 6, 7, 8, 9]


def test_long_prompts_are_cut_into_chunks_beside_decoding_rows():
    rig = Rig(max_step_tokens=8)
    rig.submit([3, 4], max_tokens=12, ignore_eos=True)
    rig.turn()
    rig.submit(list(range(1, 31)), max_tokens=3, ignore_eos=True)
    rig.run()
    rig.check()
    chunks = [c for plan in rig.plans[1:] for c in plan.chunks]
    assert [len(c.token_ids) for c in chunks] == [7, 7, 7, 7, 2]
    assert [c.next_token_id for c in chunks] == [8, 15, 22, 29, None]
    assert [c.samples for c in chunks] == [False] * 4 + [True]


def test_several_decode_steps_only_while_nobody_waits_or_ends():
    rig = Rig(decode_steps=4)
    rig.submit([3, 4], max_tokens=11, ignore_eos=True)
    rig.run()
    rig.check()
    # One token comes with the prompt, then 10 are decoded: two calls of 4, the rest singly.
    assert [plan.decode_steps for plan in rig.plans] == [1, 4, 4, 1, 1]


def test_only_rows_that_change_are_in_the_plan():
    rig = Rig(decode_steps=1, page_size=8)
    rig.submit([3, 4], max_tokens=20, ignore_eos=True)
    rig.submit([5], max_tokens=20, ignore_eos=True)
    rig.run()
    rig.check()
    quiet = [p for p in rig.plans if not (p.joins or p.page_entries or p.decode_leaves)]
    assert len(quiet) == len(rig.plans) - 5  # the prompts' step, and two rows × two pages opened
    assert all(not plan.decode_joins for plan in quiet[1:])


def test_a_stop_token_costs_what_is_in_flight_and_it_is_counted():
    rig = Rig(decode_steps=1)
    (probe,) = rig.submit([9, 9, 9], max_tokens=12, ignore_eos=True)
    rig.run()
    tokens = rig.emitted[probe]
    place = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 2)
    (sequence,) = rig.submit(
        [9, 9, 9], max_tokens=12, stop_token_ids=(tokens[place],), ignore_eos=True
    )
    rig.run()
    rig.check()
    assert sequence.stop_token_id == tokens[place]
    assert sequence.num_discarded == 1


def test_choices_share_the_prompt_and_copy_its_last_page():
    rig = Rig(max_rows=3, max_step_tokens=32)
    prompt = list(range(1, 15))  # 14 tokens: 3 full pages and a half
    leader, *others = rig.submit(prompt, n=3, max_tokens=5, ignore_eos=True)
    rig.turn()
    used_by_leader = rig.scheduler.pages.num_used
    rig.turn()
    assert used_by_leader == 4
    # Each further choice holds one page of its own, copied; the leader's tokens fit its page.
    assert rig.scheduler.pages.num_used == 6
    assert [len(plan.page_copies) for plan in rig.plans] == [0, 2]
    rig.run()
    rig.check()
    assert leader.num_cached == 0
    assert [other.num_cached for other in others] == [13, 13]
    assert len({tuple(rig.emitted[s]) for s in rig.sequences}) == 3


@pytest.mark.parametrize(
    ("looking_back", "sampling"),
    [
        (True, {"repetition_penalty": 1.2}),
        (True, {"bad_words": ((9,), (7, 8))}),
        (False, {"bad_words": ((9,),), "presence_penalty": 1.0, "frequency_penalty": 1.0}),
    ],
)
def test_the_shared_prompt_is_told_to_sampling_that_looks_back(looking_back, sampling):
    rig = Rig(max_rows=3, max_step_tokens=32)
    prompt = list(range(1, 15))
    rig.submit(prompt, n=3, max_tokens=5, ignore_eos=True, **sampling)
    rig.run()
    rig.check()
    prefixes = [join.prefix for plan in rig.plans for join in plan.joins]
    shared = prompt[:-1] if looking_back else []
    assert prefixes == [[], shared, shared]


def test_a_recomputed_sequence_has_no_prefix():
    rig = Rig(pages=11, max_rows=2, decode_steps=1, prefix=False)
    for _ in range(2):
        rig.submit([7] * 4, max_tokens=24, ignore_eos=True, repetition_penalty=1.2)
    rig.run()
    rig.check()
    assert rig.scheduler.num_preemptions
    assert all(join.prefix == [] for plan in rig.plans for join in plan.joins)


def test_choices_outlive_the_first_one():
    rig = Rig(max_rows=1, max_step_tokens=32, prefix=False)
    rig.submit([1, 2, 3, 4, 5, 6], n=3, max_tokens=4, ignore_eos=True)
    rig.run()
    rig.check()
    assert [sequence.num_cached for sequence in rig.sequences] == [0, 5, 5]
    # The last holder writes in place: only the choices before it copy.
    assert sum(len(plan.page_copies) for plan in rig.plans) == 1


def test_cancelled_leader_is_followed():
    rig = Rig(max_step_tokens=4)
    leader, second, third = rig.submit(list(range(1, 12)), n=3, max_tokens=4, ignore_eos=True)
    rig.turn()
    rig.cancel(leader)
    rig.cancel(third)
    rig.run()
    rig.check()
    assert len(rig.emitted[second]) == 4


def test_preemption_takes_the_youngest_and_it_keeps_its_place():
    rig = Rig(pages=11, max_rows=2, decode_steps=1, prefix=False)
    old, young = (rig.submit([7] * 4, max_tokens=24, ignore_eos=True)[0] for _ in range(2))
    late = rig.submit([8] * 4, max_tokens=4, ignore_eos=True)[0]
    rig.run()
    rig.check()
    assert (old.num_preemptions, late.num_preemptions) == (0, 0)
    assert young.num_preemptions >= 1 and young.num_recomputed > 4
    assert young.scheduled_ns < late.scheduled_ns


def test_lower_priority_is_preempted_before_younger():
    rig = Rig(pages=11, max_rows=2, decode_steps=1)
    low = rig.submit([7] * 4, max_tokens=24, priority=5, ignore_eos=True)[0]
    rig.turn()
    high = rig.submit([8] * 4, max_tokens=24, priority=0, ignore_eos=True)[0]
    rig.run()
    rig.check()
    assert high.num_preemptions == 0 and low.num_preemptions >= 1


def test_sliding_window_pages_are_given_back():
    rig = Rig(groups=(sliding(8),), pages=5, max_rows=1)
    (sequence,) = rig.submit(list(range(1, 40)), max_tokens=60, ignore_eos=True)
    most = 0
    while rig.scheduler.has_work:
        rig.turn()
        most = max(most, rig.scheduler.pages.num_used)
    rig.check()
    assert most <= 4 and len(rig.emitted[sequence]) == 60


def test_refusals_name_value_and_limit():
    rig = Rig(pages=5, max_context=64)
    with pytest.raises(ContextTooLong, match=r"60 tokens and max_tokens is 6.*64"):
        rig.submit([1] * 60, max_tokens=6)
    with pytest.raises(OutOfPages, match="17 positions.* 4 pages of 4"):
        rig.submit([1] * 10, max_tokens=8)
    rig.submit([1] * 10, max_tokens=7)
    with pytest.raises(Overloaded, match="100"):
        rig.submit([1], n=104)
    rig.run()
    rig.check()


def test_the_last_token_needs_no_place_in_the_context():
    rig = Rig(max_context=64)
    sequences = rig.submit([1] * 64, max_tokens=1) + rig.submit([1] * 60, max_tokens=5)
    rig.run()
    rig.check()
    assert [len(rig.emitted[sequence]) for sequence in sequences] == [1, 5]


def test_cancelling_frees_pages_at_once_in_every_state():
    rig = Rig(max_rows=2, max_step_tokens=4)
    decoding = rig.submit([1, 2], max_tokens=30, ignore_eos=True)[0]
    rig.turn()
    prefilling = rig.submit([3] * 20, max_tokens=5)[0]
    waiting = rig.submit([4] * 20, n=2, max_tokens=5)
    rig.turn()
    rig.turn()
    states = [s.state for s in (decoding, prefilling, *waiting)]
    assert states == [
        SequenceState.DECODING,
        SequenceState.PREFILLING,
        SequenceState.WAITING,
        SequenceState.HELD,
    ]
    for sequence in rig.sequences:
        rig.cancel(sequence)
    assert rig.scheduler.pages.num_used == 0
    assert rig.scheduler.num_waiting == rig.scheduler.num_running == 0
    rig.run()
    rig.check()


requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=30),
        "n": st.integers(1, 4),
        "priority": st.integers(0, 2),
        "max_tokens": st.integers(1, 24),
        "seed": st.integers(0, 3),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "bad_words": st.sampled_from([(), ((3,),), ((3, 4),)]),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    }
)
actions = st.one_of(
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("turn"), st.integers(1, 8)),
)
worlds = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([(FULL,), (sliding(6),), (FULL, sliding(9))]),
        "page_size": st.sampled_from([1, 3, 4, 16]),
        "pages": st.sampled_from([0, 3, 200]),  # beyond what the longest sequence needs alone
        "max_rows": st.integers(1, 5),
        "max_step_tokens": st.integers(5, 40),
        "decode_steps": st.sampled_from([1, 2, 5]),
        "pipelined": st.booleans(),
        "prefix": st.booleans(),
        "host_pages": st.sampled_from([0, 5, 100]),
    }
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds, script=st.lists(actions, min_size=3, max_size=25))
def test_tokens_always_equal_the_oracle(world, script):
    needed = -(-(30 + 24) // world["page_size"]) + 1
    rig = Rig(**world | {"pages": needed + world["pages"]})
    rig.play(script)
    rig.run()
    rig.check()
