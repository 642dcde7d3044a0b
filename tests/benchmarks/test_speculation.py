"""The benchmark of drafts, a little of it: SmolLM2's tokens are the same with and without them."""

from __future__ import annotations

import pytest

from benchmarks.speculation import measure
from jaxserve.scheduler.draft_costs import DraftCosts
from jaxserve.settings import load_config

pytestmark = pytest.mark.slow

SETTINGS = (
    "model.max_context=1024",
    "scheduler.max_rows=1",
    "scheduler.max_step_tokens=64",
)


@pytest.mark.in_turn
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_tokens_are_the_same_and_extracts_are_drafted(
    quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a draft may seem not to pay: where no time is known, all are tried.
    monkeypatch.setattr(DraftCosts, "measure", lambda *_, **__: None)
    settings = [*SETTINGS, f"weights.quantization={quantization}"]
    extractive, free = measure(load_config(settings=settings, environ={}), 2, 64)
    for pairs in (extractive, free):
        assert len(pairs.on) == len(pairs.off) == 2
        for on, off in zip(pairs.on, pairs.off, strict=True):
            assert on.tokens == off.tokens and off.drafted == 0
    record = extractive.record()
    assert record["accepted"] > 20
    assert record["ratio"] > 0 and record["low"] <= record["ratio"] <= record["high"]
