"""Adapters on a mesh: each device holds its part of them, and what comes is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.test_sharded import SCANNED, assert_equal
from tests.models.loading import ORACLE

#: As few programs as do.
FEW = (
    "scheduler.decode_steps=1",
    "scheduler.max_rows=2",
    "scheduler.max_step_tokens=8",
    "lora.vocabulary=false",
    "lora.classes=8x3",
)


@pytest.mark.slow
@pytest.mark.in_turn("on a mesh")
@pytest.mark.parametrize(
    ("case", "mesh"), [("llama3", (2, 1, 4)), ("qwen2_tied", (1, 2, 4)), ("gemma2", (8, 1, 1))]
)
def test_adapters_on_a_mesh(case: str, mesh: tuple[int, int, int], tmp_path: Path) -> None:
    """Copies of the model have slots of their own; matrices, heads and vocabulary are split."""
    check(case, mesh, tmp_path, "scheduler.decode_steps=1")


@pytest.mark.slow
@pytest.mark.in_turn("on a mesh")
@pytest.mark.parametrize(
    ("case", "mesh"),
    [("mixtral", (1, 4, 2)), ("qwen3_moe", (2, 2, 2)), ("qwen3_moe_mixed", (1, 4, 2))],
)
def test_experts_on_a_mesh(case: str, mesh: tuple[int, int, int], tmp_path: Path) -> None:
    """Each device has the deltas of its own experts, or of its own columns of them; or of all."""
    check(case, mesh, tmp_path, *FEW, "lora.experts=true")


def check(case: str, mesh: tuple[int, int, int], directory: Path, *settings: str) -> None:
    """The same from a mesh and from one device, and nothing is compiled after warm-up."""
    words = [str(ORACLE / case), *map(str, mesh), str(directory), SCANNED, *settings]
    command = [sys.executable, "-m", "tests.device.sharded_lora", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert_equal(found, 2e-3)
    assert found["mesh"]["joins"] == found["one"]["joins"] == 8
