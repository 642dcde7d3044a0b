"""Other models and backends under the executor: windows, several cache groups, packed weights.

Each serves the same company of requests over too few pages, with prompts longer than the window in
chunks, shared prompts and preemption; the tokens are those of `tests.models.driver`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.models.options import ModelOptions
from tests.device.rig import LIMITS, Rig, Warm, prompt_of, warm
from tests.models.loading import load_tiny

pytestmark = pytest.mark.slow

XLA, CPU = ModelOptions(), ModelOptions(matmul="cpu", attention="cpu")
MODELS = {
    "gemma2_cpu": ("gemma2", CPU, LIMITS),
    "gemma3_scanned": ("gemma3_linear", replace(XLA, layers="scanned"), LIMITS),
    "mistral_xla": ("mistral", XLA, replace(LIMITS, decode_steps=1)),
    "llama3_cpu_scanned": ("llama3", replace(CPU, layers="scanned"), LIMITS),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Warm:
    """One of MODELS, ready."""
    case, options, limits = MODELS[request.param]
    return warm(load_tiny(case, options), limits)


def test_rows_in_company(model: Warm) -> None:
    rig = Rig(model)
    expected = {}
    for i, (length, num) in enumerate([(3, 40), (40, 9), (17, 1), (1, 9), (90, 20), (13, 30)]):
        prompt = prompt_of(length, i)
        (sequence,) = rig.submit(prompt, max_tokens=num)
        expected[sequence] = model.greedy(prompt, num)
        for _ in range(i):
            rig.turn()
    rig.run()
    assert rig.emitted == expected
    assert any(name.endswith("_k4") for name in rig.programs) == (model.limits.decode_steps > 1)


def test_preempted_rows_and_choices_over_few_pages(model: Warm) -> None:
    """Prompts longer than the window: pages behind it are given back and used by others."""
    rig = Rig(model, pages=24)
    expected = {}
    for i, length in enumerate((22, 9, 31, 14)):
        prompt = prompt_of(length, i)
        sequences = rig.submit(prompt, n=2, max_tokens=30)
        expected |= dict.fromkeys(sequences, model.greedy(prompt, 30))
    rig.run()
    assert rig.emitted == expected
    assert rig.copies > 0
    if any(group.window is None for group in model.model.cache_groups()):
        assert rig.scheduler.num_preemptions > 0


def test_log_probabilities_and_sampling_run_without_compiling(model: Warm) -> None:
    """`Rig.run` looks; sampled tokens are the same in company and alone."""
    prompt = prompt_of(30)
    sampling = {"temperature": 1.1, "top_p": 0.9, "max_tokens": 12, "repetition_penalty": 1.2}
    company = Rig(model)
    (one,) = company.submit(prompt, **sampling)
    company.submit(prompt_of(25, 1), max_tokens=20, logprobs=3, prompt_logprobs=2)
    company.run()
    assert company.emitted[one] == Rig(model).generate(prompt, **sampling)
