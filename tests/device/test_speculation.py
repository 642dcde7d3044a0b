"""Drafts verified by a real model: tokens and log-probabilities are those that come without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.models.options import ModelOptions
from tests.device.rig import LIMITS, Beside, Rig, Warm, prompt_of, warm
from tests.fakes.drafts import ToldDrafts
from tests.models.loading import load_tiny

SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "nucleus": {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "adjusted": {
        "temperature": 0.7,
        "logit_bias": ((17, 2.0), (30, -3.0)),
        "bad_words": ((40,),),
        "min_tokens": 12,
        "ignore_eos": False,
        "stop_token_ids": (50, 51, 52),
    },
    "allowed": {"temperature": 1.0, "allowed_token_ids": tuple(range(10, 60))},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
}
NUM = 40
FEW_PROGRAMS = SchedulerConfig(max_rows=2, max_step_tokens=8, decode_steps=1, draft_tokens=3)


def drafted(model: Warm, prompts: list[list[int]], wrong: int, **sampling) -> tuple[Rig, Rig]:
    """Serves the same prompts without drafts and with told ones."""
    limits = model.limits
    plain = Rig(replace(model, limits=replace(limits, draft_tokens=0)))
    told = Rig(model)
    for rig in (plain, told):
        for seed, prompt in enumerate(prompts):
            rig.submit(prompt, seed=seed, **{"max_tokens": NUM} | sampling)
        if rig is told:
            expected = list(plain.emitted.values())
            for sequence, outputs in zip(rig.emitted, expected, strict=True):
                ToldDrafts(sequence, outputs, wrong)
        rig.run()
    assert not any(name.startswith("verify") for name in plain.programs)
    return plain, told


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("wrong", [0, 3])
def test_tokens_are_those_that_come_one_by_one(llama: Warm, name: str, wrong: int) -> None:
    plain, told = drafted(llama, [prompt_of(9, 5)], wrong, **SAMPLINGS[name])
    (expected,), (found,) = plain.emitted.values(), told.emitted.values()
    assert found == expected
    assert len(found) > 5
    (sequence,) = told.emitted
    assert "verify_r1_d3" in told.programs and sequence.num_kept > 0
    assert (sequence.num_drafted - sequence.num_kept > 3) == (wrong > 0)
    same_logprobs(plain.logprobs, told.logprobs)


@pytest.mark.parametrize("wrong", [0, 2, 5])
def test_rows_draft_together_and_beside_rows_that_decode(llama: Warm, wrong: int) -> None:
    """The third row looks back at its tokens, and does not draft."""
    prompts = [prompt_of(length, length) for length in (5, 18, 30)]
    plain, told = Rig(replace(llama, limits=replace(LIMITS, draft_tokens=0))), Rig(llama)
    for rig in (plain, told):
        for seed, prompt in enumerate(prompts):
            penalty = 1.3 if seed == 2 else 1.0
            rig.submit(
                prompt, seed=seed, temperature=0.8, max_tokens=NUM, repetition_penalty=penalty,
                logprobs=2,
            )  # fmt: skip
        if rig is told:
            for sequence, outputs in zip(rig.emitted, plain.emitted.values(), strict=True):
                if not sequence.looks_back:
                    ToldDrafts(sequence, outputs, wrong)
        rig.run()
    assert list(told.emitted.values()) == list(plain.emitted.values())
    assert "verify_r4_d3" in told.programs
    assert [sequence.num_drafted > 0 for sequence in told.emitted] == [True, True, False]
    same_logprobs(plain.logprobs, told.logprobs)


def test_what_was_rejected_is_never_read(llama: Warm) -> None:
    """All guesses are wrong: pages are full of keys and values that must not count."""
    plain, told = drafted(llama, [prompt_of(6, 1)], 1)
    assert list(told.emitted.values()) == list(plain.emitted.values())
    (sequence,) = told.emitted
    assert sequence.num_kept == 0 and sequence.num_drafted > 2 * NUM


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("gemma3_linear", replace(ModelOptions(), layers="scanned")),
        ("gemma2", ModelOptions(matmul="cpu", attention="cpu")),
    ],
)
def test_windows(case: str, options: ModelOptions) -> None:
    """Several cache groups, texts longer than their windows."""
    model = warm(load_tiny(case, options), FEW_PROGRAMS)
    for wrong in (0, 2):
        plain, told = drafted(model, [prompt_of(50, 3), prompt_of(7, 4)], wrong, temperature=0.8)
        assert list(told.emitted.values()) == list(plain.emitted.values())
        assert any(name.startswith("verify") for name in told.programs)


def same_logprobs(plain: dict, told: dict) -> None:
    """Of each sequence, but for rounding."""
    for one, other in zip(plain.values(), told.values(), strict=True):
        assert isinstance(one, Beside) and isinstance(other, Beside)
        assert one.rank == other.rank and one.top_ids == other.top_ids
        np.testing.assert_allclose(one.chosen, other.chosen, atol=1e-4)
        np.testing.assert_allclose(one.top_values, other.top_values, atol=1e-4)
