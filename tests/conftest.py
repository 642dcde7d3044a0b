"""Settings of all tests.

The environment is fixed here, before JAX is imported: no test may reach a network, and the
persistent compilation cache of a developer's machine must not decide what a test sees.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Two busy cores: a slow example is not a failure, and the examples are the same on every run.
settings.register_profile("jaxserve", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("jaxserve")
