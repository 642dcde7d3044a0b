"""Every architecture against transformers' logits, on small random checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.models.options import ModelOptions
from tests.models.driver import Driver
from tests.models.loading import CASES, DENSE, MIXTURES, ORACLE, load_tiny

TOLERANCE = 1e-4
XLA = ModelOptions()
SCANNED = ModelOptions(layers="scanned")
CPU = ModelOptions(layers="scanned", matmul="cpu", attention="cpu")
#: What a mixture of experts runs with on a CPU: there is no native matmul of them.
MIXTURE = ModelOptions(attention="cpu")
#: Cases whose layers repeat with different kinds, or all alike: what a scan has to get right.
REPEATING = ("llama3", "gemma2", "gemma3_linear", *MIXTURES)


def _reference(case: str) -> tuple[list[int], np.ndarray]:
    arrays = np.load(ORACLE / case / "reference.npz")
    return arrays["tokens"].tolist(), arrays["logits"]


def _check(case: str, options: ModelOptions) -> None:
    tokens, expected = _reference(case)
    model = load_tiny(case, options)
    shape = {"num_rows": 3, "num_tokens": 48}  # one program for all steps below

    whole = Driver(model, 3, 64)
    last, hidden = whole.step({1: tokens}, **shape)
    np.testing.assert_allclose(whole.all_logits(hidden), expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(last[0], expected[-1], atol=TOLERANCE, rtol=0)

    # three sequences, each a piece of the prompt further than the next, in one batch
    mixed, seen = Driver(model, 3, 64), {0: [], 1: [], 2: []}
    pieces = (tokens[:13], tokens[13:14], tokens[14:33], tokens[33:34], tokens[34:])
    for turn in range(len(pieces) + 2):
        step = {row: pieces[turn - row] for row in range(3) if 0 <= turn - row < len(pieces)}
        _, hidden = mixed.step(step, **shape)
        for row, part in step.items():
            seen[row].append(hidden[: len(part)])
            hidden = hidden[len(part) :]
    for parts in seen.values():
        logits = mixed.all_logits(np.concatenate(parts))
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", DENSE)
def test_native_matmul_and_attention_match_transformers(case: str) -> None:
    _check(case, CPU)


@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures_with_native_attention_match_transformers(case: str) -> None:
    _check(case, MIXTURE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_plain_xla_matches_transformers(case: str) -> None:
    _check(case, XLA)


@pytest.mark.parametrize("case", REPEATING)
def test_scanned_layers_match_transformers(case: str) -> None:
    _check(case, SCANNED)


@pytest.mark.parametrize("case", ["mistral", "gemma2"])
def test_unrolled_layers_with_packed_weights_match_transformers(case: str) -> None:
    _check(case, ModelOptions(layers="unrolled", matmul="cpu", attention="cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str) -> None:
    tokens, expected = _reference("llama3")
    driver = Driver(load_tiny("llama3", ModelOptions(dtype=dtype)), 1, 64, dtype)
    _, hidden = driver.step({0: tokens})
    assert hidden.dtype == dtype
    logits = driver.all_logits(hidden)
    assert logits.dtype == np.float32
    error = np.abs(logits - expected)
    # 8 and 11 bits of mantissa, logits of magnitude 5
    assert error.max() < (0.4 if dtype == "bfloat16" else 0.05)
    assert error.max() > 1e-4


def test_packed_float16_weights_stay_near() -> None:
    tokens, expected = _reference("llama3")
    options = ModelOptions(dtype="float16", matmul="cpu", attention="cpu")
    driver = Driver(load_tiny("llama3", options), 1, 64)
    _, hidden = driver.step({0: tokens})
    np.testing.assert_allclose(driver.all_logits(hidden), expected, atol=5e-3, rtol=0)
