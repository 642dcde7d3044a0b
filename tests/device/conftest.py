"""A warm executor that the tests of this directory share: compiling takes longer than they do."""

from __future__ import annotations

import pytest

from jaxserve.models.options import ModelOptions
from tests.device.rig import Warm, warm
from tests.models.loading import load_tiny


@pytest.fixture(scope="session")
def llama() -> Warm:
    """Llama 3 in float32, on XLA alone."""
    return warm(load_tiny("llama3", ModelOptions()))
