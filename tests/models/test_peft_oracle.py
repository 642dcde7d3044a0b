"""Adapters that peft saved, against the logits that peft's own model gave with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.formats.peft import read_adapter
from jaxserve.models.options import ModelOptions
from tests.models.driver import Driver
from tests.models.loading import MIXTURES, ORACLE, load_tiny
from tests.models.test_adapters import slots_with

LORA = Path(__file__).parent.parent / "data" / "lora"
#: Each with its base, as scripts/make_lora_oracle.py has them.
CASES = {
    "attention": "llama3",
    "linear": "qwen2_tied",
    "patterns": "llama3",
    "vocabulary": "llama3",
    "gemma": "gemma2",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
}
TOLERANCE = 1e-3
OPTIONS = ModelOptions(layers="scanned", matmul="cpu", attention="cpu", lora="cpu")
#: The native matmul takes no experts.
MIXTURE = ModelOptions(layers="scanned", attention="cpu", lora="cpu")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts(case: str) -> None:
    """With the adapter's slot, and the base's own without."""
    base = CASES[case]
    model = load_tiny(base, MIXTURE if base in MIXTURES else OPTIONS)
    adapter = read_adapter(LORA / case, max_rank=16)
    slots = slots_with(model, [adapter], [3])
    reference = np.load(ORACLE / base / "reference.npz")
    tokens = reference["tokens"].tolist()
    expected = np.load(LORA / case / "logits.npz")["logits"]
    assert np.abs(expected - reference["logits"]).max() > 0.1
    driver = Driver(model, 2, 64, adapters=(slots.arrays, [3, -1]))
    for start in range(0, len(tokens), 5):  # logits come after each chunk's last token
        piece = tokens[start : start + 5]
        last, _ = driver.step({0: piece, 1: piece})
        at = start + len(piece) - 1
        np.testing.assert_allclose(last[0], expected[at], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(last[1], reference["logits"][at], atol=TOLERANCE, rtol=0)
