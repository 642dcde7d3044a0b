"""A warm executor that the tests of this directory share: compiling takes longer than they do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.models.options import ModelOptions
from tests.device.rig import LIMITS, Warm, warm
from tests.models.loading import load_tiny


@pytest.fixture(scope="session")
def llama() -> Warm:
    """Llama 3 in float32, on XLA alone; with programs for drafts."""
    return warm(load_tiny("llama3", ModelOptions()), replace(LIMITS, draft_tokens=3))
