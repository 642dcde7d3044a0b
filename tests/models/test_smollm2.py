"""The embedded model against transformers: every logit that the oracle kept, and greedy tokens.

The oracle's own tokens are fed, so that every position is compared whatever happened before.
"""

from __future__ import annotations

import pytest

from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from tests.models.driver import Driver
from tests.models.loading import load_smollm2
from tests.models.oracle import MARGIN, Oracle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="module")
def native_model() -> Decoder:
    return load_smollm2(ModelOptions(matmul="cpu", attention="cpu", layers="scanned"))


def test_oracle_covers_what_is_promised(oracle: Oracle) -> None:
    assert oracle.tokens.shape[0] >= 20 and oracle.tokens.shape[1] == 64
    lens = oracle.arrays["prompt_lens"]
    assert lens.min() == 1 and lens.max() > 250
    margins = oracle.arrays["top_values"][..., 0] - oracle.arrays["top_values"][..., 1]
    assert (margins > MARGIN).mean() > 0.99


def test_batch_of_all_prompts_decodes_like_transformers(
    oracle: Oracle, native_model: Decoder
) -> None:
    num_prompts, num_steps = oracle.tokens.shape
    driver = Driver(native_model, num_prompts, 384)
    for p, prompt in enumerate(oracle.prompts):
        last, _ = driver.step({p: prompt}, num_rows=1, num_tokens=32 if len(prompt) <= 32 else 320)
        oracle.check(p, 0, last[0])
    for step in range(num_steps - 1):
        logits, _ = driver.step({p: [oracle.tokens[p, step]] for p in range(num_prompts)})
        for p in range(num_prompts):
            oracle.check(p, step + 1, logits[p])


def test_chunks_beside_decoding_rows_match_transformers(
    oracle: Oracle, native_model: Decoder
) -> None:
    """Three long prompts in chunks of 50, while the short ones decode in the same steps."""
    num_steps = 24
    chosen = sorted(range(len(oracle.prompts)), key=lambda p: -len(oracle.prompts[p]))[:3]
    short = [p for p in range(len(oracle.prompts)) if len(oracle.prompts[p]) <= 5][:4]
    driver = Driver(native_model, len(oracle.prompts), 384)
    feeds = {p: oracle.prompts[p] + oracle.tokens[p, :num_steps].tolist() for p in chosen + short}
    checked = 0
    for _ in range(num_steps + 8):
        step = {}
        for p, feed in feeds.items():
            done, prompt_len = driver.lens[p], len(oracle.prompts[p])
            if done < len(feed):
                step[p] = feed[done : min(done + 50, prompt_len) if done < prompt_len else done + 1]
        if not step:
            break
        logits, _ = driver.step(step, num_rows=8, num_tokens=160)
        for i, p in enumerate(step):
            generated = driver.lens[p] - len(oracle.prompts[p])
            if 0 <= generated < oracle.tokens.shape[1]:
                oracle.check(p, generated, logits[i])
                checked += 1
    assert checked == len(feeds) * (num_steps + 1)


def test_plain_xla_scanned_matches_transformers(oracle: Oracle) -> None:
    """Another backend in everything: dense weights, XLA attention, one scanned layer."""
    model = load_smollm2(ModelOptions(layers="scanned"))
    driver = Driver(model, 4, 384)
    for row, p in enumerate((4, 11, 17, 23)):
        prompt, tokens = oracle.prompts[p], oracle.tokens[p].tolist()
        _, hidden = driver.step({row: prompt + tokens}, num_rows=1, num_tokens=384)
        logits = driver.all_logits(hidden[len(prompt) - 1 :][: len(tokens)])
        for step in range(len(tokens)):
            oracle.check(p, step, logits[step])
