"""Sharded equals unsharded: the whole engine on meshes of eight simulated devices."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from tests.device.sharded import DRAFTING, PROMPT_LENS, SAMPLINGS
from tests.models.loading import ORACLE, config_of

SCANNED = "kernels.layers=scanned"


def serve_on_both(model: Path | str, mesh: tuple[int, int, int], *settings: str) -> dict[str, Any]:
    """What `tests.device.sharded` prints."""
    command = [sys.executable, "-m", "tests.device.sharded", str(model), *map(str, mesh), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"log": done.stderr}


def assert_equal(found: dict[str, Any], tolerance: float) -> None:
    """The same tokens and ranks, and log-probabilities but for rounding."""
    mesh, one = found["mesh"], found["one"]
    assert mesh["pages_used"] == one["pages_used"] == 0
    assert mesh["compiles"] == one["compiles"] == 0
    told = 0
    for number in map(str, range(len(PROMPT_LENS))):
        assert len(mesh[number]["tokens"]) == 12
        assert mesh[number]["tokens"] == one[number]["tokens"]
        if int(number) % len(SAMPLINGS) == len(SAMPLINGS) - 1:
            assert re.fullmatch("([0-9]{2}[a-z]){4}", bytes(mesh[number]["tokens"]).decode())
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = np.array(mesh[number][name]), np.array(one[number][name])
            assert ours.shape == theirs.shape
            if len(ours):
                told += len(ours)
                assert ours[:, 0].tolist() == theirs[:, 0].tolist()
                np.testing.assert_allclose(ours[:, 2], theirs[:, 2], atol=tolerance, rtol=0)
    assert told > 50


def assert_drafted(found: dict[str, Any]) -> None:
    """With drafts the same tokens came."""
    with_drafts = found["with_drafts"]
    assert with_drafts["drafted"] > 10
    for number in map(str, range(DRAFTING)):
        assert with_drafts[number]["tokens"] == found[number]["tokens"]


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose 8 KV heads, vocabulary and MLP eight devices divide."""
    directory = tmp_path_factory.mktemp("even")
    config = config_of("llama3") | {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "intermediate_size": 256,  # two groups of 4-bit codes a device
    }
    (directory / "config.json").write_text(json.dumps(config))
    kind = model_class(config)
    rules = kind.hf_tensors(kind.spec_from_hf(config), ModelOptions())
    random = np.random.default_rng(3)
    tensors = {
        name: (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for rule in rules.values()
        for name, shape in zip(rule.names, rule.shapes, strict=True)
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.in_turn
@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 1, 4), (8, 1, 1), (1, 2, 4)], ids=str)
def test_heads_that_the_mesh_divides(even: Path, mesh: tuple[int, int, int]) -> None:
    drafts = ["scheduler.draft_tokens=3"] if mesh == (2, 1, 4) else []
    found = serve_on_both(even, mesh, SCANNED, *drafts)
    assert_equal(found, 2e-5)
    if drafts:
        assert_drafted(found["mesh"])
        assert_drafted(found["one"])
    assert "zeros" not in found["log"] and "times" not in found["log"]


@pytest.mark.in_turn("further")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights(even: Path, quantization: str) -> None:
    found = serve_on_both(even, (2, 1, 4), SCANNED, f"weights.quantization={quantization}")
    assert_equal(found, 2e-5)


@pytest.mark.in_turn("further")
def test_pages_of_the_host(even: Path) -> None:
    """Few pages: sequences are set back and come again, on the mesh and on one device."""
    settings = "cache.num_pages=20", "cache.preemption=swap", "cache.host_bytes=4000000"
    found = serve_on_both(even, (2, 1, 4), SCANNED, *settings)
    assert_equal(found, 2e-5)
    assert found["mesh"]["swapped_tokens"] > 10 and found["one"]["swapped_tokens"] > 30


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("case", "mesh", "heads"),
    [
        ("llama3", (1, 1, 8), "4 KV heads of zeros fill up"),
        ("llama3", (2, 1, 4), "2 KV heads are held 2 times"),
        ("gemma2", (1, 2, 4), ""),
        ("qwen3", (2, 1, 4), ""),
    ],
)
def test_heads_that_it_does_not_divide(case: str, mesh: tuple[int, int, int], heads: str) -> None:
    found = serve_on_both(ORACLE / case, mesh, SCANNED if case != "gemma2" else "cache.page_size=8")
    assert_equal(found, 2e-5)
    assert heads in found["log"]


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("case", "mesh", "whole"),
    [
        ("mixtral", (1, 4, 2), ""),
        pytest.param("mixtral", (2, 4, 1), "", marks=pytest.mark.slow),
        pytest.param("mixtral", (1, 8, 1), "", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", (1, 2, 4), "", marks=pytest.mark.slow),
        pytest.param("qwen3_moe_mixed", (1, 2, 4), "", marks=pytest.mark.slow),
        ("qwen3_moe_mixed", (1, 4, 2), "layers.1.mlp.gate.weight (2, 6, 64, 40)"),
    ],
)
def test_experts(case: str, mesh: tuple[int, int, int], whole: str) -> None:
    found = serve_on_both(ORACLE / case, mesh, SCANNED)
    assert_equal(found, 2e-5)
    assert whole in found["log"]
    assert whole or "mlp.gate.weight" not in found["log"]


@pytest.mark.in_turn("further")
def test_experts_as_codes_and_layers_one_by_one() -> None:
    settings = "weights.quantization=int8", "kernels.layers=unrolled"
    assert_equal(serve_on_both(ORACLE / "qwen3_moe", (1, 4, 2), *settings), 2e-5)


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 1, 4), (8, 1, 1)], ids=str)
def test_smollm2(mesh: tuple[int, int, int]) -> None:
    found = serve_on_both("smollm2-135m-instruct", mesh, SCANNED)
    assert_equal(found, 2e-3)
