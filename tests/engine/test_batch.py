"""The batches: padding, order, arrays that stay, and every step as `ExactBatch` reads it."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.device.step import StepInputs
from jaxserve.engine.batches import Batches
from jaxserve.scheduler.plan import Chunk, Join, PageCopy, Plan
from jaxserve.types import SamplingParams
from tests.fakes.batch import ComparedBatch, DoublingShapes
from tests.fakes.executor import FULL, sliding
from tests.fakes.rig import VOCAB, Rig


def join(slot: int, **values) -> Join:
    """A sequence takes a slot."""
    sampling = SamplingParams(**{"max_tokens": 9, "seed": slot} | values)
    return Join(slot=slot, sampling=sampling, prompt_len=3, choice=0)


def chunk(slot: int, start: int, token_ids: list[int], **values) -> Chunk:
    """Known tokens of a row."""
    return Chunk(**{"slot": slot, "start": start, "token_ids": token_ids, "samples": True} | values)


class Builder:
    """The batches of one copy of the model."""

    def __init__(self) -> None:
        self._batches = Batches(DoublingShapes(), 8)

    def build(self, plan: Plan) -> StepInputs:
        """The inputs of one plan."""
        (inputs,) = self._batches.build([plan])
        return inputs


def started(num_rows: int) -> Builder:
    """A builder with rows 0 … num_rows - 1 decoding, three tokens each."""
    builder = Builder()
    slots = range(num_rows)
    builder.build(
        Plan(
            step_id=0,
            joins=[join(slot) for slot in slots],
            chunks=[chunk(slot, 0, [1, 2, 3]) for slot in slots],
        )
    )
    builder.build(Plan(step_id=1, decode_joins=list(slots), decode_starts=[3] * num_rows))
    return builder


def test_chunks_stand_behind_the_decoding_rows_and_padding_behind_both():
    inputs = started(2).build(
        Plan(
            step_id=2,
            joins=[join(5)],
            page_entries=[(1, 5, 2, 7)],
            page_copies=[PageCopy(group=0, source=3, target=4)],
            chunks=[
                chunk(5, 0, [11, 12, 13], samples=False, next_token_id=14, prompt_logprobs=2),
                chunk(6, 4, [21, 22]),
            ],
        )
    )
    assert inputs.program.name == "mixed_r4_t8_plp"
    assert (inputs.num_live_rows, inputs.num_decode_rows) == (4, 2)
    assert inputs.rows.tolist() == [0, 1, 5, 6]
    assert inputs.query_starts.tolist() == [0, 1, 2, 5, 7]
    assert inputs.context_lens.tolist() == [5, 5, 3, 6]
    assert inputs.token_ids.tolist() == [0, 0, 11, 12, 13, 21, 22, 0]
    assert inputs.next_token_ids.tolist() == [0, 0, 12, 13, 14, 22, 0, 0]
    assert inputs.samples.tolist() == [True, True, False, True]
    assert inputs.page_entries == [(1, 5, 2, 7)] and inputs.page_copies == [(0, 3, 4)]
    assert [write.slot for write in inputs.slot_writes] == [5]


def test_leaving_rows_are_cut_out_and_a_slot_may_be_joined_in_the_same_plan():
    builder = started(4)
    builder.build(Plan(step_id=2, joins=[join(7)], chunks=[chunk(7, 0, [5] * 6)]))
    inputs = builder.build(
        Plan(step_id=3, decode_leaves=[1, 3], decode_joins=[7], decode_starts=[6])
    )
    assert inputs.rows.tolist() == [0, 2, 7, 8]
    assert inputs.context_lens.tolist() == [6, 6, 7, 0]
    assert inputs.query_starts.tolist() == [0, 1, 2, 3, 3]


def test_several_decode_steps_move_the_rows_on_by_as_many():
    builder = started(2)
    first = builder.build(Plan(step_id=2, decode_steps=4))
    second = builder.build(Plan(step_id=3))
    assert first.program.decode_steps == 4 and second.program.decode_steps == 1
    assert first.context_lens.tolist() == [5, 5] and second.context_lens.tolist() == [9, 9]


def test_decoding_rows_sit_out_a_step_of_prompts():
    builder = started(2)
    prompts = Plan(step_id=2, decode_steps=0, joins=[join(4)], chunks=[chunk(4, 0, [9])])
    inputs = builder.build(prompts)
    assert (inputs.num_decode_rows, inputs.num_live_rows) == (0, 1)
    assert not inputs.program.is_decode  # one row of one token, but a prompt's
    assert inputs.rows[:1].tolist() == [4] and inputs.context_lens[:1].tolist() == [1]
    inputs = builder.build(Plan(step_id=3, decode_joins=[4], decode_starts=[1]))
    assert inputs.rows[:3].tolist() == [0, 1, 4]
    assert inputs.context_lens[:3].tolist() == [5, 5, 2]


def test_quiet_steps_repeat_the_arrays_and_nobody_can_write_them():
    builder = started(3)
    first, second = (builder.build(Plan(step_id=step)) for step in (2, 3))
    assert second.rows is first.rows and second.query_starts is first.query_starts
    assert second.context_lens is not first.context_lens
    assert first.context_lens.tolist() == [5, 5, 5, 0]
    assert not (first.rows.flags.writeable or first.samples.flags.writeable)


def test_logprobs_are_computed_only_while_a_sampling_row_wants_them():
    builder = started(2)
    plan = Plan(step_id=2, joins=[join(4, logprobs=0)], chunks=[chunk(4, 0, [1], samples=False)])
    assert not builder.build(plan).logprobs
    assert builder.build(Plan(step_id=3, chunks=[chunk(4, 1, [2])])).logprobs
    assert builder.build(Plan(step_id=4, decode_joins=[4], decode_starts=[2])).logprobs
    assert not builder.build(Plan(step_id=5, decode_leaves=[4])).logprobs
    plan = Plan(step_id=6, joins=[join(4)], chunks=[chunk(4, 0, [1])])
    assert not builder.build(plan).logprobs
    assert not builder.build(Plan(step_id=7, decode_joins=[4], decode_starts=[1])).logprobs


def test_drafts_are_a_row_of_a_verification_program_and_the_row_decodes_from_what_was_accepted():
    builder = started(2)
    plan = Plan(step_id=2, decode_leaves=[0], chunks=[chunk(0, 4, [7, 8, 9, 10], num_drafts=3)])
    inputs = builder.build(plan)
    assert inputs.program.name == "verify_r2_d7"
    assert inputs.rows.tolist() == [1, 0] and inputs.num_decode_rows == 1
    assert inputs.query_starts.tolist() == [0, 1, 5]
    assert inputs.context_lens.tolist() == [5, 8]
    assert inputs.token_ids.tolist() == [0, 7, 8, 9, 10] + [0] * 11
    assert inputs.samples.tolist() == [True, True]
    inputs = builder.build(Plan(step_id=3, decode_joins=[0], decode_starts=[6]))
    assert inputs.program.name == "decode_r2"
    assert inputs.context_lens.tolist() == [6, 7]


requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=30),
        "n": st.integers(1, 3),
        "priority": st.integers(0, 1),
        "max_tokens": st.integers(1, 24),
        "seed": st.integers(0, 3),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "bad_words": st.sampled_from([(), ((7,),), ((7, 8),)]),
        "logprobs": st.sampled_from([None, None, 0, 3]),
        "prompt_logprobs": st.sampled_from([None, None, 1]),
    }
)
actions = st.one_of(
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("turn"), st.integers(1, 8)),
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    groups=st.sampled_from([(FULL,), (FULL, sliding(9))]),
    pages=st.sampled_from([0, 3, 200]),
    max_rows=st.integers(1, 6),
    decode_steps=st.sampled_from([1, 3]),
    script=st.lists(actions, min_size=3, max_size=20),
)
def test_every_step_is_what_the_exact_batch_reads(groups, pages, max_rows, decode_steps, script):
    batch = ComparedBatch(DoublingShapes(), max_rows)
    rig = Rig(
        groups=groups,
        page_size=4,
        pages=15 + pages,
        max_rows=max_rows,
        decode_steps=decode_steps,
        batch=batch,
    )
    rig.play(script)
    rig.run()
    rig.check()
    batch.check()


def test_copies_share_the_smallest_program_that_holds_all_of_them():
    batches = Batches(DoublingShapes(), 8, copies=3)
    joins = [join(slot) for slot in range(3)]
    first = Plan(step_id=0, joins=joins, chunks=[chunk(slot, 0, [1, 2]) for slot in range(3)])
    second = Plan(step_id=0, joins=[join(0)], chunks=[chunk(0, 0, [7] * 9, prompt_logprobs=1)])
    inputs = batches.build([first, None, second])
    assert [own.program.name for own in inputs] == ["mixed_r4_t16_plp"] * 3
    assert [own.num_live_rows for own in inputs] == [3, 0, 1]
    assert inputs[0].token_ids.tolist() == [1, 2] * 3 + [0] * 10
    assert inputs[1].rows.tolist() == [8] * 4
    assert inputs[1].query_starts.tolist() == [0] * 5
    assert not inputs[1].samples.any()
    assert inputs[2].query_starts.tolist() == [0, 9, 9, 9, 9]


def test_a_chunk_beside_rows_that_decode_gets_a_program_for_chunks():
    """Eight rows in one copy, eight tokens of a row in the other: no decode program holds both."""
    batches = Batches(DoublingShapes(), 8, copies=2)
    slots = range(8)
    joins, chunks = [join(slot) for slot in slots], [chunk(slot, 0, [1]) for slot in slots]
    batches.build([Plan(step_id=0, joins=joins, chunks=chunks), None])
    decoding = Plan(step_id=1, decode_joins=list(slots), decode_starts=[1] * 8)
    inputs = batches.build(
        [decoding, Plan(step_id=1, joins=[join(0)], chunks=[chunk(0, 0, [5] * 8)])]
    )
    assert not inputs[0].program.is_decode
    assert [own.num_decode_rows for own in inputs] == [8, 0]
    assert inputs[1].token_ids[:8].tolist() == [5] * 8
