"""What is foretold, how well, and what drafting must promise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.copies import Schedulers
from jaxserve.scheduler.draft_costs import DraftCosts
from jaxserve.scheduler.drafts import GRAM, OUTPUT_SLICE, PROMPT_SLICE, Drafts
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.types import ModelInfo, SamplingParams
from tests.fakes.drafts import ToldDrafts
from tests.fakes.executor import FULL
from tests.fakes.rig import Rig


def followed(tokens: list[int], prompt_len: int) -> Drafts:
    """Drafts of a sequence whose tokens came one by one after its prompt."""
    known = tokens[:prompt_len]
    drafts = Drafts(known, prompt_len)
    drafts.take_in()
    for token in tokens[prompt_len:]:
        known.append(token)
        drafts.take_in()
    return drafts


def test_what_followed_the_same_tokens_is_foretold():
    drafts = followed([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 8)
    assert drafts.foretells and drafts.guess(3) == [4, 5, 6]


def test_two_tokens_that_agree_are_not_enough():
    assert not followed([1, 2, 3, 4, 5, 6, 9, 2, 3], 8).foretells


def test_a_loop_is_foretold_round_and_round():
    assert followed([7, 8, 7, 8, 7, 8], 1).guess(7) == [7, 8, 7, 8, 7, 8, 7]


def test_the_place_is_followed_while_it_agrees_and_left_when_it_does_not():
    drafts = followed([1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4], 8)
    assert drafts.guess(2) == [5, 6]
    assert not followed([1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4, 4], 8).foretells


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    prompt_len=st.integers(1, 40),
)
def test_a_guess_continues_an_earlier_occurrence_of_the_end(tokens, prompt_len):
    drafts = followed(tokens, min(prompt_len, len(tokens)))
    end = tuple(tokens[-GRAM:])
    earlier = [
        place for place in range(GRAM, len(tokens)) if tuple(tokens[place - GRAM : place]) == end
    ]
    assert drafts.foretells == bool(earlier)
    if earlier:
        continuations = [(tokens[place:] * 6)[:6] for place in earlier]
        assert drafts.guess(6) in continuations


def test_a_long_prompt_is_taken_in_by_slices():
    known = [*range(3 * PROMPT_SLICE), 5, 6, 7]
    drafts = Drafts(known, len(known))
    for taken in range(1, 5):
        assert not drafts.foretells
        drafts.take_in()
        assert drafts._num_taken == min(taken * PROMPT_SLICE, len(known))
    assert drafts.guess(2) == [8, 9]


def test_a_long_output_is_taken_in_by_slices():
    known = list(range(5))
    drafts = Drafts(known, len(known))
    known += [3, 4, 5] * OUTPUT_SLICE
    for _ in range(3):
        assert not drafts.foretells
        drafts.take_in()
    drafts.take_in()
    assert drafts.foretells


def test_accuracy_is_learned_from_what_comes_drafted_or_not():
    good = followed([1, 2, 3, 4] * 20, 4)
    bad = followed([*(x for n in range(40) for x in (1, 2, 3, 100 + n)), 1, 2, 3], 4)
    assert good.accuracy() > 0.95
    assert bad.accuracy() < 0.1
    assert good.accuracy(ahead=8) == good.accuracy()


def test_times_lie_on_lines_between_what_was_measured():
    costs = DraftCosts(16)
    assert costs.plain_ns(1) == costs.verify_ns(1, 4) == 0
    costs.measure(1, 100, verifies=False)
    assert costs.plain_ns(1) == costs.verify_ns(1, 7) == 100  # drafts are free until measured
    costs.measure(8, 170, verifies=True)
    assert [costs.verify_ns(1, num) for num in (0, 1, 4, 7, 15)] == [100, 110, 140, 170, 170]
    costs.measure(4, 100, verifies=True)
    assert [costs.verify_ns(1, num) for num in (1, 3, 5, 7)] == [100, 100, 135, 170]


def test_a_time_falls_faster_than_it_rises():
    costs = DraftCosts(16)
    for ns in (100, 200):
        costs.measure(1, ns, verifies=False)
    assert costs.plain_ns(1) == 110
    costs.measure(1, 90, verifies=False)
    assert costs.plain_ns(1) == 100
    costs.measure(1, 0, verifies=False)  # not measured
    costs.measure(99, 5, verifies=False)  # beyond the curve
    assert costs.plain_ns(1) == 100


@pytest.mark.parametrize(
    ("verify_ns", "num_drafts"),
    [
        ({2: 100, 4: 100, 8: 100}, 7),  # memory-bound: all are free
        ({2: 100, 4: 100, 8: 190}, 3),  # four tokens are as fast as one
        ({2: 300, 4: 600, 8: 1200}, 0),  # it does not pay
    ],
)
def test_as_many_are_drafted_as_the_measured_times_let_pay(verify_ns, num_drafts):
    rig = Rig(draft_tokens=7, decode_steps=1)
    for tokens, ns in verify_ns.items():
        rig.scheduler.measured(tokens, ns, verifies=True)
    rig.scheduler.measured(1, 100, verifies=False)
    (sequence,) = rig.submit([5, 6, 7], max_tokens=80, ignore_eos=True)
    ToldDrafts(sequence, rig.expected(sequence))
    rig.run()
    rig.check()
    drafted = [chunk.num_drafts for plan in rig.plans for chunk in plan.chunks if chunk.num_drafts]
    assert max(drafted, default=0) == num_drafts


def test_a_row_whose_guesses_fail_stops_drafting_and_begins_again():
    """Its text repeats itself, then not, then again."""
    rig = Rig(draft_tokens=7, decode_steps=1, max_context=1000, pages=250)
    rig.scheduler.measured(1, 100, verifies=False)
    rig.scheduler.measured(8, 150, verifies=True)
    (sequence,) = rig.submit([5, 6, 7], max_tokens=300, ignore_eos=True)
    told = ToldDrafts(sequence, rig.expected(sequence))
    shares = {100: 0.95, 200: 0.05, 300: 0.95}
    drafted = []
    for end, share in shares.items():
        told.accuracy = lambda ahead=0, share=share: share  # type: ignore[method-assign]
        before = sequence.num_drafted
        while sequence.num_outputs < end:
            rig.turn()
        drafted.append(sequence.num_drafted - before)
    rig.run()
    rig.check()
    assert drafted[0] > 50 and drafted[1] <= 14 and drafted[2] > 50


def test_beside_rows_that_decode_a_draft_must_make_up_for_every_other_call():
    """One draft right would only make up for the call that is missed; seven pay."""
    for most, pays in ((1, False), (7, True)):
        rig = Rig(draft_tokens=most, decode_steps=1, max_rows=2, pages=100)
        rig.scheduler.measured(1, 100, verifies=False)
        rig.scheduler.measured(2, 100, verifies=False)
        rig.scheduler.measured(2 + most, 105, verifies=True)
        told, plain = (rig.submit([5, 6, s], max_tokens=100, ignore_eos=True)[0] for s in (1, 2))
        ToldDrafts(told, rig.expected(told))
        while min(told.num_outputs, plain.num_outputs) < 50:
            rig.turn()
        # By chance the other row may seem to repeat itself once: both then leave for drafting.
        assert told.num_drafted > 50 if pays else told.num_drafted <= 2
        rig.run()
        rig.check()


class TwoCopies:
    """Schedulers of two copies of a model that emits 1, 2, 3, … whatever it is asked."""

    OUTPUTS = range(1, 50)

    def __init__(self) -> None:
        model = ModelInfo(
            name="fake", max_context=256, vocab_size=50, eos_token_ids=(0,), cache_groups=(FULL,)
        )
        config = SchedulerConfig(max_rows=2, max_step_tokens=16, decode_steps=4, draft_tokens=3)
        self.schedulers = Schedulers(config, model, page_size=4, num_pages=[100], copies=2)
        self.running: list[list[Sequence]] = [[], []]

    def submit(self, prompt: list[int]) -> Sequence:
        """A request of 40 tokens; it goes to the copy with fewer."""
        sampling = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)
        (sequence,) = self.schedulers.submit([("client", 0)], prompt, sampling)
        return sequence

    def turn(self) -> list[Plan | None]:
        """One device call of both copies, read at once."""
        plans = self.schedulers.plan() or []
        for copy, plan in enumerate(plans):
            if plan is not None:
                self._carry_out(copy, plan)
        return plans

    def _carry_out(self, copy: int, plan: Plan) -> None:
        scheduler = self.schedulers._schedulers[copy]
        for slot in plan.decode_leaves:
            self.running[copy].remove(scheduler._rows.slots.owner(slot))
        self.running[copy] += [scheduler._rows.slots.owner(slot) for slot in plan.decode_joins]
        rows = [s.slot for s in self.running[copy]] + [c.slot for c in plan.chunks]
        sampled = []
        for slot in rows:
            num = scheduler._rows.slots.owner(slot).num_outputs
            sampled.append([*self.OUTPUTS[num : num + plan.decode_steps]])
        for row, chunk in enumerate(plan.chunks, len(rows) - len(plan.chunks)):
            num = scheduler._rows.slots.owner(chunk.slot).num_outputs
            sampled[row] = [*self.OUTPUTS[num : num + 1 + chunk.num_drafts]]
        width = max(map(len, sampled))
        self.schedulers.commit(copy, rows, [row + [-1] * (width - len(row)) for row in sampled])


def test_copies_draft_only_when_all_may():
    """A prompt of one copy is in the same device call, which then verifies nothing."""
    copies = TwoCopies()
    drafting, beside = copies.submit([5, 6, 7]), copies.submit([5, 6, 7])
    ToldDrafts(drafting, copies.OUTPUTS)
    calls = [copies.turn() for _ in range(4)]
    verifying = [plans for plans in calls if _drafts(plans)]
    assert len(verifying) == 2
    for _, other in verifying:
        assert other is not None and other.decode_steps == 1  # it decodes in the same call
    late = copies.submit([1] * 40)
    late = late if late.copy == beside.copy else copies.submit([1] * 40)
    assert late.copy != drafting.copy
    prefilling = [copies.turn() for _ in range(3)]
    assert not any(map(_drafts, prefilling))
    assert drafting.state is SequenceState.DECODING
    while copies.schedulers.has_work:
        copies.turn()
    for sequence in (drafting, beside, late):
        assert sequence.token_ids[sequence.prompt_len :] == [*copies.OUTPUTS[:40]]


def _drafts(plans: list[Plan | None]) -> int:
    return sum(chunk.num_drafts for plan in plans if plan is not None for chunk in plan.chunks)
