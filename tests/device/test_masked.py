"""Masked steps of a real model: rows are sampled by the host's masks, the others as ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxserve.types import Grammar
from tests.device.rig import LIMITS, Rig, Warm, next_tokens, prompt_of
from tests.fakes.drafts import ToldDrafts

#: Only says that the rows have masks, which the tests make.
GRAMMAR = Grammar(kind="regex", text="")
NUM = 30
SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    "adjusted": {
        "temperature": 0.8,
        "logit_bias": ((17, 2.0), (30, -100.0)),
        "bad_words": ((40,), (41, 42)),
        "repetition_penalty": 1.2,
    },
}


def third(outputs: list[int]) -> range:
    """Another third of the vocabulary in each place."""
    return range(sum(outputs, len(outputs)) % 3, 256, 3)


def plain_limits(model: Warm) -> Warm:
    return replace(model, limits=replace(model.limits, draft_tokens=0))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_masks_that_allow_everything_change_nothing(llama: Warm, name: str) -> None:
    """Nor the log-probabilities: they are of what the model says."""
    plain, masked = Rig(plain_limits(llama)), Rig(plain_limits(llama))
    for rig, grammar in ((plain, None), (masked, GRAMMAR)):
        for seed, length in enumerate((5, 18, 40)):
            rig.submit(
                prompt_of(length, seed),
                **{"seed": seed, "max_tokens": NUM, "logprobs": 2, "grammar": grammar}
                | SAMPLINGS[name],
            )
        rig.run()
    assert list(masked.emitted.values()) == list(plain.emitted.values())
    for found, expected in zip(masked.logprobs.values(), plain.logprobs.values(), strict=True):
        assert found.top_ids == expected.top_ids
        np.testing.assert_allclose(found.chosen, expected.chosen, atol=1e-5)
    assert masked.num_masked > NUM > plain.num_masked == 0
    assert not any("k4" in name for name in masked.programs)


def test_the_best_of_the_allowed_tokens_is_taken(llama: Warm) -> None:
    prompts = [prompt_of(length, length) for length in (3, 21, 50)]
    rig = Rig(plain_limits(llama))
    rig.allowed = third
    for prompt in prompts:
        rig.submit(prompt, max_tokens=NUM, grammar=GRAMMAR)
    free = rig.submit(prompts[0], max_tokens=NUM)[0]
    rig.run()
    for prompt, outputs in zip(prompts, rig.emitted.values(), strict=False):

        def best(logits: np.ndarray, known: list[int], start: int = len(prompt)) -> int:
            allowed = list(third(known[start:]))
            return allowed[int(np.argmax(logits[allowed]))]

        assert outputs == next_tokens(llama.model, prompt, NUM, best)
    assert rig.emitted[free] == llama.greedy(prompts[0], NUM)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_mask_is_allowed_token_ids_bit_for_bit(llama: Warm, name: str) -> None:
    """Drawn with the same random bits from the same distribution."""
    ids = tuple(range(12, 320, 7))
    rig, other = Rig(plain_limits(llama)), Rig(plain_limits(llama))
    rig.allowed = lambda outputs: ids
    masked = rig.generate(prompt_of(9), max_tokens=NUM, grammar=GRAMMAR, **SAMPLINGS[name])
    listed = other.generate(prompt_of(9), max_tokens=NUM, allowed_token_ids=ids, **SAMPLINGS[name])
    assert masked == listed and set(masked) <= set(ids)


@pytest.mark.parametrize("name", ["greedy", "sampled"])
@pytest.mark.parametrize("wrong", [0, 3])
def test_drafts_are_verified_by_the_masks_of_their_places(
    llama: Warm, name: str, wrong: int
) -> None:
    plain, told = Rig(plain_limits(llama)), Rig(llama)
    prompts = [prompt_of(7, 3), prompt_of(12, 4)]
    for rig in (plain, told):
        rig.allowed = third
        for seed, prompt in enumerate(prompts):
            grammar = GRAMMAR if seed == 0 else None
            rig.submit(prompt, seed=seed, max_tokens=NUM, grammar=grammar, **SAMPLINGS[name])
        if rig is told:
            for sequence, outputs in zip(rig.emitted, plain.emitted.values(), strict=True):
                ToldDrafts(sequence, outputs, wrong)
        rig.run()
    assert list(told.emitted.values()) == list(plain.emitted.values())
    first = next(iter(told.emitted))
    assert first.num_kept > 0 and told.num_masked < plain.num_masked
    assert LIMITS.draft_tokens == 0 and any(p.startswith("verify") for p in told.programs)
