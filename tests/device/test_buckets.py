"""The step programs: few, and whatever the limits allow fits one with little padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig
from jaxserve.device.buckets import MAX_PROGRAMS, Buckets
from jaxserve.errors import ConfigError


@st.composite
def limits(draw) -> SchedulerConfig:
    """Any limits that a configuration may have."""
    max_rows = draw(st.one_of(st.integers(1, 300), st.integers(1, 4096)))
    return SchedulerConfig(
        max_rows=max_rows,
        max_step_tokens=draw(st.integers(max_rows, 65536)),
        decode_steps=draw(st.integers(1, 64)),
        draft_tokens=draw(st.sampled_from([0, 1, 7, 64])),
        draft_rows=draw(st.integers(1, 64)),
    )


def test_programs_of_the_default_limits():
    assert [program.name for program in Buckets(SchedulerConfig()).programs] == [
        "decode_r1",
        "decode_r1_k4",
        "verify_r1_d7",
        "decode_r2",
        "decode_r4",
        "decode_r8",
        "decode_r8_k4",
        "mixed_r8_t32",
        "verify_r8_d7",
        "mixed_r8_t128",
        "mixed_r8_t512",
        "decode_r16",
        "decode_r32",
        "decode_r32_k4",
        "decode_r64",
        "decode_r64_k4",
        "mixed_r64_t128",
        "mixed_r64_t512",
        "mixed_r64_t512_plp",
    ]


def test_programs_where_padding_rows_are_nearly_free():
    programs = Buckets(SchedulerConfig(), row_growth=4).programs
    decode = [program.name for program in programs if program.is_decode]
    assert decode == [
        "decode_r1",
        "decode_r1_k4",
        "decode_r4",
        "decode_r16",
        "decode_r16_k4",
        "decode_r64",
        "decode_r64_k4",
    ]


def test_programs_where_one_row_costs_more_than_two():
    programs = Buckets(SchedulerConfig(), row_growth=4, least_rows=2).programs
    decode = [program.name for program in programs if program.is_decode]
    assert decode == [
        "decode_r2",
        "decode_r2_k4",
        "decode_r8",
        "decode_r8_k4",
        "decode_r32",
        "decode_r32_k4",
        "decode_r64",
        "decode_r64_k4",
    ]
    (only,) = {
        program.num_rows for program in Buckets(SchedulerConfig(max_rows=1), least_rows=2).programs
    }
    assert only == 1


@given(limits(), st.sampled_from([2, 4]), st.sampled_from([1, 2]))
def test_there_are_few_and_no_name_twice(config, row_growth, least_rows):
    programs = Buckets(config, row_growth, least_rows).programs
    assert len(programs) <= MAX_PROGRAMS
    assert len({program.name for program in programs}) == len(programs)


@given(limits(), st.sampled_from([2, 4]), st.sampled_from([1, 2]), st.data())
def test_every_decode_step_fits_with_at_most_four_times_the_rows(
    config, row_growth, least_rows, data
):
    rows = data.draw(st.integers(1, config.max_rows))
    buckets = Buckets(config, row_growth, least_rows)
    one = buckets.choose(rows, rows, 1, False)
    assert one.is_decode and rows <= one.num_rows <= max(least_rows, 4 * (rows - 1))
    several = buckets.choose(rows, rows, config.decode_steps, False)
    assert several.decode_steps == config.decode_steps and several.num_rows >= rows


@given(limits(), st.data())
def test_every_mixed_step_fits_a_program_that_is_not_for_decoding_only(config, data):
    rows = data.draw(st.integers(1, config.max_rows))
    tokens = data.draw(st.integers(rows, config.max_step_tokens))
    for prompt_logprobs in (False, True):
        program = Buckets(config).choose(rows, tokens, 1, prompt_logprobs)
        assert program.num_rows >= rows and program.num_tokens >= tokens
        assert program.prompt_logprobs == prompt_logprobs
        assert program.is_decode == (rows == tokens and not prompt_logprobs)


@given(limits(), st.data())
def test_every_step_with_drafts_fits_a_program_of_its_own(config, data):
    most = config.max_verify_rows
    verifying = [p for p in Buckets(config).programs if p.draft_tokens]
    assert bool(verifying) == bool(most)
    if most:
        rows = data.draw(st.integers(1, most))
        tokens = data.draw(st.integers(rows + 1, rows * (1 + config.draft_tokens)))
        program = Buckets(config).choose(rows, tokens, 1, False, True)
        assert program.num_rows >= rows and program.num_tokens >= tokens
        assert program.draft_tokens == config.draft_tokens
        assert program.num_tokens <= config.max_step_tokens


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ((1, 30), "mixed_r8_t32"),
        ((1, 33), "mixed_r8_t128"),
        ((9, 30), "mixed_r64_t128"),
        ((64, 512), "mixed_r64_t512"),
        ((3, 3), "decode_r4"),
        ((64, 64, 4), "decode_r64_k4"),
        ((1, 4, 1, True), "mixed_r64_t512_plp"),
        ((1, 4, 1, False, True), "verify_r1_d7"),
        ((2, 5, 1, False, True), "verify_r8_d7"),
    ],
)
def test_the_least_padding_is_chosen(step, name):
    assert Buckets(SchedulerConfig()).choose(*step).name == name


def test_one_program_of_each_kind_where_batches_must_not_matter():
    buckets = Buckets(SchedulerConfig(), batch_invariant=True)
    names = ["decode_r64", "mixed_r64_t512", "mixed_r64_t512_plp"]
    assert [program.name for program in buckets.programs] == names
    sizes = [(1, 1), (64, 64), (1, 2), (7, 300), (64, 512)]
    assert [buckets.choose(*size).name for size in sizes] == [names[i] for i in (0, 0, 1, 1, 1)]


@pytest.mark.parametrize("step", [(65, 65), (1, 513), (4, 4, 2)])
def test_a_step_beyond_the_limits_is_refused_with_the_limits(step):
    with pytest.raises(ConfigError, match=r"max_rows is 64, .*max_step_tokens 512"):
        Buckets(SchedulerConfig()).choose(*step)


@given(limits())
def test_each_program_has_a_twin_for_adapters(config: SchedulerConfig) -> None:
    """Of the same size, and none is taken where the other is asked for."""
    plain, both = Buckets(config).programs, Buckets(config, adapters=True)
    assert len(both.programs) == 2 * len(plain) <= 2 * MAX_PROGRAMS
    assert {replace(program, adapters=False) for program in both.programs} == set(plain)
    one, other = both.choose(1, 1), both.choose(1, 1, adapters=True)
    assert other == replace(one, adapters=True) and other.name == f"{one.name}_lora"


def test_batch_invariant_steps_are_all_of_the_twins() -> None:
    """A row must not depend on whether others use adapters."""
    buckets = Buckets(SchedulerConfig(), batch_invariant=True, adapters=True)
    assert all(program.adapters for program in buckets.programs)
    assert buckets.choose(3, 3) == buckets.choose(3, 3, adapters=True)
