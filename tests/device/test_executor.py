"""The executor: what warming up does, how a step's results are read, work and time counted.

What the steps compute is in `test_programs`.
"""

from __future__ import annotations

import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxserve.device.changes import COPIES_A_CALL, ENTRIES_A_CALL, PREFIX_TOKENS_A_CALL
from jaxserve.device.step import Program, SlotWrite, StepInputs, empty_inputs
from jaxserve.sampling.state import PROMPT_BIT
from jaxserve.types import SamplingParams
from tests.device.rig import (
    LIMITS,
    NUM_PAGES,
    Beside,
    Rig,
    Warm,
    all_logits,
    log_softmax,
    prompt_of,
)

pytestmark = pytest.mark.slow

SAMPLED = {"temperature": 0.9, "seed": 11, "frequency_penalty": 0.7, "repetition_penalty": 1.4}


def empty(program: Program, **changes) -> StepInputs:
    """A step without rows."""
    return replace(empty_inputs(program, LIMITS.max_rows), **changes)


def decoding(program: Program, context_lens: list[int]) -> StepInputs:
    """A step of decoding rows."""
    num = len(context_lens)
    padded = np.zeros(program.num_rows, np.int32)
    padded[:num] = context_lens
    return empty(
        program,
        rows=np.asarray([*range(num), *[LIMITS.max_rows] * (program.num_rows - num)], np.int32),
        num_live_rows=num,
        num_decode_rows=num,
        query_starts=np.minimum(np.arange(program.num_rows + 1), num).astype(np.int32),
        context_lens=padded,
        samples=np.arange(program.num_rows) < num,
    )


def test_progress_is_told_for_every_program(llama: Warm) -> None:
    num = len(llama.progress)
    samplings = {program.sampling(heads=False) for program in llama.buckets.programs}
    # the steps; what samples by masks; slots with and without lists, page tables, prefixes, copies
    # in one group; saves and loads of two sizes
    assert num == len(llama.buckets.programs) + len(samplings) + 5 + 4
    assert llama.progress == [("compiling", done, num) for done in range(1, num + 1)]


def test_what_is_compiled_later_is_counted(llama: Warm) -> None:
    before = llama.executor.compiles_after_warmup
    for program in llama.buckets.programs:
        llama.executor.collect(llama.executor.launch([empty(program, logprobs=True)]))
    assert llama.executor.compiles_after_warmup == before
    jax.jit(lambda x: x * 2.5)(np.float32(1))
    assert llama.executor.compiles_after_warmup > before


def test_many_page_table_entries_are_written_in_order(llama: Warm) -> None:
    """More than the step's own array and two calls hold, with places written several times."""
    executor = llama.executor
    rng = np.random.default_rng(0)
    columns = executor._state.page_tables[0].shape[1]
    num = 2 * ENTRIES_A_CALL + 40
    slots, indices = rng.integers(0, LIMITS.max_rows, num), rng.integers(0, columns, num)
    pages = rng.integers(1, NUM_PAGES, num)
    expected = np.asarray(executor._state.page_tables[0]).copy()
    entries = []
    for slot, index, page in zip(slots.tolist(), indices.tolist(), pages.tolist(), strict=True):
        entries.append((0, slot, index, page))
        expected[slot, index] = page
    executor.collect(executor.launch([empty(llama.buckets.choose(1, 1), page_entries=entries)]))
    np.testing.assert_array_equal(executor._state.page_tables[0], expected)


def test_many_pages_are_copied(llama: Warm) -> None:
    rig = Rig(llama)
    executor = llama.executor
    rig.generate(prompt_of(60))
    (pages,) = jax.tree.leaves(executor._state.cache.groups[0])
    before = np.asarray(pages)
    num = 2 * COPIES_A_CALL + 3
    targets = np.random.default_rng(1).permutation(np.arange(100, NUM_PAGES))[:num].tolist()
    sources = [1 + i % 10 for i in range(num)]
    copies = [(0, *pair) for pair in zip(sources, targets, strict=True)]
    executor.collect(executor.launch([empty(llama.buckets.choose(1, 1), page_copies=copies)]))
    expected = before.copy()
    expected[:, targets] = before[:, sources]
    (pages,) = jax.tree.leaves(executor._state.cache.groups[0])
    np.testing.assert_array_equal(pages[:, 1:], expected[:, 1:])
    assert np.isfinite(expected[:, targets]).all()


def test_a_long_prefix_is_counted_in_several_calls(llama: Warm) -> None:
    sampling = SamplingParams(max_tokens=5, seed=1, repetition_penalty=2.0)
    prefix = prompt_of(PREFIX_TOKENS_A_CALL + 9, 5)
    write = SlotWrite(
        slot=2, sampling=sampling, prompt_len=len(prefix) - 3, choice=0, prefix=prefix
    )
    executor = llama.executor
    executor.collect(executor.launch([empty(llama.buckets.choose(1, 1), slot_writes=[write])]))
    expected = np.zeros(llama.model.spec.vocab_size, np.uint16)
    expected[prefix[:-3]] |= PROMPT_BIT
    np.add.at(expected, prefix[-3:], 1)  # a preempted sequence's output
    np.testing.assert_array_equal(executor._state.sampling.counts[2], expected)


def test_times_of_steps_do_not_overlap(llama: Warm) -> None:
    executor = llama.executor
    program = llama.buckets.choose(4, 4, 4)
    executor.collect(executor.launch([empty(program)]))
    time.sleep(0.05)
    start = time.monotonic_ns()
    launched = [executor.launch([empty(program)]) for _ in range(3)]
    outputs = [executor.collect(one)[0] for one in launched]
    elapsed = time.monotonic_ns() - start
    assert outputs[0].idle_ns >= 50_000_000
    assert [one.idle_ns for one in outputs[1:]] == [0, 0]
    assert all(one.device_ns > 0 for one in outputs)
    assert sum(one.device_ns for one in outputs) <= elapsed


def test_work_of_several_decode_steps_is_that_of_each(llama: Warm) -> None:
    model, executor = llama.model, llama.executor
    several = executor.count_work(decoding(llama.buckets.choose(3, 3, 4), [5, 9, 30]))
    steps = [model.count_work(3, 3, 44 + 3 * i, cache_dtype_bytes=4) for i in range(4)]
    assert several == (sum(flops for flops, _ in steps), sum(size for _, size in steps))
    one = executor.count_work(decoding(llama.buckets.choose(3, 3), [5, 9, 30]))
    assert one == steps[0]


def test_work_of_a_mixed_step(llama: Warm) -> None:
    """A decoding row at 7, and a chunk of 9 tokens that end at 12 and are not sampled from."""
    inputs = decoding(Program(num_rows=4, num_tokens=16), [7, 12])
    inputs = replace(
        inputs,
        num_decode_rows=1,
        query_starts=np.asarray([0, 1, 10, 10, 10], np.int32),
        samples=np.asarray([True, False, False, False]),
    )
    expected = llama.model.count_work(10, 1, 19, cache_dtype_bytes=4)
    assert llama.executor.count_work(inputs) == expected


def check_beside(found: Beside, logits: np.ndarray, token_ids: list[int]) -> None:
    """Log-probabilities of these tokens, one a row of `logits`."""
    expected = log_softmax(logits)
    own = expected[np.arange(len(token_ids)), token_ids]
    best = np.sort(expected, axis=1)[:, ::-1][:, :20]
    np.testing.assert_allclose(found.chosen, own, atol=1e-4, rtol=0)
    larger = [np.sum(expected > own[:, None] + slack, axis=1) for slack in (1e-4, -1e-4)]
    assert np.all((larger[0] <= found.rank) & (found.rank <= larger[1]))
    np.testing.assert_allclose(found.top_values, best, atol=1e-4, rtol=0)
    of_ids = np.take_along_axis(expected, np.asarray(found.top_ids), axis=1)
    np.testing.assert_allclose(of_ids, found.top_values, atol=1e-4, rtol=0)
    assert all(len(set(ids)) == 20 for ids in found.top_ids)


def test_log_probabilities_are_the_models_own(llama: Warm) -> None:
    """Of prompts in chunks and of outputs of several steps a call, whatever the sampler does."""
    rig = Rig(llama)
    wanted = {"logprobs": 20, "prompt_logprobs": 20, "max_tokens": 14}
    sequences = [
        *rig.submit(prompt_of(40), **wanted),
        *rig.submit(prompt_of(7, 1), n=2, **wanted | SAMPLED),
        *rig.submit(prompt_of(1, 2), **wanted, logit_bias=((50, 100.0),)),
        *rig.submit(prompt_of(5, 3), max_tokens=9),
    ]
    rig.run()
    assert {"mixed_r4_t16_plp", "decode_r4", "decode_r1_k4"} <= set(rig.programs)
    for sequence in sequences[:4]:
        known, size = sequence.token_ids, sequence.prompt_len
        assert known[size:] == rig.emitted[sequence] and len(known) == size + 14
        logits = all_logits(llama.model, known)
        check_beside(rig.logprobs[sequence], logits[size - 1 : -1], known[size:])
        if sequence.choice == 0 and size > 1:
            check_beside(rig.prompt_logprobs[sequence], logits[: size - 1], known[1:size])
        else:
            assert rig.prompt_logprobs[sequence].chosen == []
    assert rig.emitted[sequences[3]] == [50] * 14
    assert rig.logprobs[sequences[4]].chosen == []


def test_log_probabilities_are_computed_only_where_somebody_wants_them(llama: Warm) -> None:
    rig = Rig(llama)
    rig.submit(prompt_of(5), max_tokens=30)
    rig.submit(prompt_of(5, 1), max_tokens=5, logprobs=0)
    rig.run()
    wanted = [outputs.logprobs is not None for outputs in rig.outputs]
    assert wanted == [True] * 2 + [False] * (len(wanted) - 2)
    assert all(outputs.prompt_logprobs is None for outputs in rig.outputs)
