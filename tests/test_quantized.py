"""What quantization costs SmolLM2, in perplexity through the real engine."""

from __future__ import annotations

import functools

import pytest

from jaxserve.settings import load_config
from tests.perplexity import perplexity

pytestmark = pytest.mark.slow

SMALL = ("scheduler.max_rows=2", "scheduler.max_step_tokens=256", "cache.num_pages=200")


@functools.cache
def measured(*settings: str) -> float:
    return perplexity(load_config(None, [*SMALL, *settings]))


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("setting", "bound"),
    [
        ("weights.quantization=int8", 0.01),
        ("weights.quantization=int4", 0.05),
        ("weights.quantization=fp8", 0.05),
        ("cache.dtype=fp8", 0.01),
        ("cache.dtype=int8", 0.01),
    ],
)
def test_perplexity_changes_little(setting: str, bound: float) -> None:
    change = measured(setting) / measured() - 1
    assert 0 < abs(change) < bound
