"""What steps compute: every sequence gets the tokens it would get alone, whoever runs beside it.

Greedy tokens are held against `tests.models.driver`; where the sampler has a part, against the
same request alone on the same executor, or against what a few lines of numpy choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason
from tests.device.rig import MAX_CONTEXT, Rig, Warm, next_tokens, prompt_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 50, MAX_CONTEXT - 21])
def test_one_row_alone(llama: Warm, length: int) -> None:
    """Up to the last position of the context."""
    prompt = prompt_of(length)
    rig = Rig(llama)
    assert rig.generate(prompt, max_tokens=21) == llama.greedy(prompt, 21)
    assert rig.programs.count("mixed_r4_t16") == length // 16 + (length % 16 > 1)
    assert rig.programs.count("decode_r1_k4") >= 4


def test_reference_tokens_are_not_all_the_same(llama: Warm) -> None:
    """Or the other tests here would show little."""
    assert len({token for seed in range(4) for token in llama.greedy(prompt_of(9, seed), 12)}) > 20


def test_rows_that_come_and_go_in_company(llama: Warm) -> None:
    """More requests than rows, prompts in chunks beside decoding rows, slots used again."""
    rig = Rig(llama)
    expected = {}
    for i, (length, num) in enumerate([(3, 30), (40, 5), (17, 1), (1, 9), (90, 12), (8, 2)] * 2):
        prompt = prompt_of(length, i)
        (sequence,) = rig.submit(prompt, max_tokens=num)
        expected[sequence] = llama.greedy(prompt, num)
        for _ in range(i):
            rig.turn()
    rig.run()
    assert rig.emitted == expected
    assert set(rig.programs) >= {"mixed_r4_t16", "decode_r4", "decode_r4_k4"}


def test_a_preempted_sequence_goes_on_where_it_was(llama: Warm) -> None:
    rig = Rig(llama, pages=17)
    prompts = [prompt_of(9 + i, i) for i in range(4)]
    sequences = [rig.submit(prompt, max_tokens=30)[0] for prompt in prompts]
    rig.run()
    assert rig.scheduler.num_preemptions > 2
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert rig.emitted[sequence] == llama.greedy(prompt, 30)


def test_end_tokens_end_and_cancelled_rows_harm_nobody(llama: Warm) -> None:
    prompts = [prompt_of(6, i) for i in range(6)]
    expected = [llama.greedy(prompt, 24) for prompt in prompts]
    rig = Rig(llama)
    sequences = [
        rig.submit(prompt, max_tokens=24, stop_token_ids=(tokens[7 + i],))[0]
        for i, (prompt, tokens) in enumerate(zip(prompts, expected, strict=True))
    ]
    for _ in range(5):
        rig.turn()
    rig.scheduler.cancel(sequences[1], FinishReason.CANCELLED)
    rig.run()
    for i, (sequence, tokens) in enumerate(zip(sequences, expected, strict=True)):
        stop = tokens.index(tokens[7 + i])
        if i == 1:
            assert rig.emitted[sequence] == tokens[: len(rig.emitted[sequence])]
        else:
            assert rig.emitted[sequence] == tokens[:stop]
            assert sequence.reason is FinishReason.STOP


@pytest.mark.parametrize("length", [1, 13, 16, 150])
def test_choices_share_the_prompt(llama: Warm, length: int) -> None:
    """The page that all write to is copied; all of a long prompt's pages are entered."""
    prompt = prompt_of(length)
    rig = Rig(llama)
    sequences = rig.submit(prompt, n=6, max_tokens=10)
    rig.run()
    expected = llama.greedy(prompt, 10)
    assert [rig.emitted[sequence] for sequence in sequences] == [expected] * 6
    assert [sequence.num_cached for sequence in sequences] == [0, *[length - 1] * 5]
    assert (rig.copies > 0) == ((length - 1) % 4 != 0)


def alone(warm: Warm, prompt: list[int], choice: int = 0, **sampling: Any) -> list[int]:
    """The tokens of one choice of a request, without sharing and without company."""
    rig = Rig(warm)
    (sequence,) = rig.submit(prompt, **sampling)
    sequence.choice = choice
    rig.run()
    assert rig.prefixes == rig.copies == 0
    return rig.emitted[sequence]


SAMPLED = {"temperature": 0.9, "seed": 11, "max_tokens": 14}
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}


@pytest.mark.parametrize("beside", [{}, {"top_k": 20, "top_p": 0.9}, PENALTIES], ids=str)
def test_sampled_choices_are_what_each_is_alone(llama: Warm, beside: dict[str, Any]) -> None:
    prompt = prompt_of(30)
    rig = Rig(llama)
    sequences = rig.submit(prompt, n=5, **SAMPLED, **beside)
    rig.submit(prompt_of(20, 1), max_tokens=30)
    rig.run()
    tokens = [rig.emitted[sequence] for sequence in sequences]
    assert tokens == [alone(llama, prompt, i, **SAMPLED, **beside) for i in range(5)]
    assert len(set(map(tuple, tokens))) == 5


def random_request(rng: np.random.Generator) -> tuple[list[int], dict[str, Any]]:
    """A prompt, and sampling parameters."""
    prompt = rng.integers(10, 320, rng.integers(1, 45)).tolist()
    sampling: dict[str, Any] = {"max_tokens": int(rng.integers(1, 20))}
    if rng.random() < 0.6:
        sampling |= {"temperature": 0.8, "seed": int(rng.integers(2**60)), "top_p": 0.95}
    if rng.random() < 0.5:
        sampling |= PENALTIES
    if rng.random() < 0.3:
        sampling |= {"bad_words": tuple((token,) for token in range(10, 60)), "min_tokens": 3}
    if rng.random() < 0.3:
        sampling |= {"logprobs": 2, "prompt_logprobs": 1}
    return prompt, sampling


@pytest.mark.parametrize("seed", range(4))
def test_any_company_changes_nothing(llama: Warm, seed: int) -> None:
    """Random requests and arrivals over too few pages, in one go and each alone."""
    rng = np.random.default_rng(seed)
    requests = [random_request(rng) for _ in range(25)]
    rig = Rig(llama, pages=24)
    owned: list[tuple[int, Sequence]] = []
    for i, (prompt, sampling) in enumerate(requests):
        owned += [(i, s) for s in rig.submit(prompt, n=int(rng.integers(1, 4)), **sampling)]
        for _ in range(rng.integers(0, 5)):
            rig.turn()
    rig.run()
    assert rig.scheduler.num_preemptions > 0 and rig.copies > 0 and rig.prefixes > 0
    for i, sequence in owned:
        prompt, sampling = requests[i]
        assert rig.emitted[sequence] == alone(llama, prompt, sequence.choice, **sampling), i


def penalized(logits: np.ndarray, known: list[int], num_prompt: int) -> np.ndarray:
    """PENALTIES, as their definitions say."""
    logits = logits.astype(np.float64)
    seen = np.unique(known)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.4, logits[seen] * 1.4)
    for token in known[num_prompt:]:
        logits[token] -= 0.3
    logits[np.unique(known[num_prompt:]).astype(int)] -= 0.5
    return logits


@pytest.mark.parametrize("length", [9, 150])
def test_penalties_over_a_shared_prefix(llama: Warm, length: int) -> None:
    """The prompt counts, though the choices never see it, and so does what a call's steps add."""
    prompt = prompt_of(length)
    expected = next_tokens(
        llama.model, prompt, 24,
        lambda logits, known: int(np.argmax(penalized(logits, known, length))),
    )  # fmt: skip
    assert expected != llama.greedy(prompt, 24)
    rig = Rig(llama)
    sequences = rig.submit(prompt, n=3, max_tokens=24, **PENALTIES)
    rig.run()
    assert [rig.emitted[sequence] for sequence in sequences] == [expected] * 3
    assert rig.prefixes == 2
    assert rig.programs.count("decode_r4_k4") > 2


def test_bad_words_over_a_shared_prefix(llama: Warm) -> None:
    """Words that begin in the prompt, some of it in the part that is shared."""
    prompt = prompt_of(13)
    greedy = llama.greedy(prompt, 12)
    words = ((*prompt[-7:], greedy[0]), (greedy[4],), tuple(greedy[7:9]))

    def choose(logits: np.ndarray, known: list[int]) -> int:
        logits = logits.copy()
        for word in words:
            if len(word) == 1 or tuple(known[-len(word) + 1 :]) == word[:-1]:
                logits[word[-1]] = -np.inf
        return int(np.argmax(logits))

    expected = next_tokens(llama.model, prompt, 12, choose)
    assert expected[0] != greedy[0]
    rig = Rig(llama)
    sequences = rig.submit(prompt, n=3, max_tokens=12, bad_words=words)
    rig.run()
    assert [rig.emitted[sequence] for sequence in sequences] == [expected] * 3
    assert rig.prefixes == 2
