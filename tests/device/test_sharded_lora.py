"""Adapters on a mesh: each device holds its part of them, and what comes is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.test_sharded import SCANNED, assert_equal
from tests.models.loading import ORACLE


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("case", "mesh"), [("llama3", (2, 1, 4)), ("qwen2_tied", (1, 2, 4)), ("gemma2", (8, 1, 1))]
)
def test_adapters_on_a_mesh(case: str, mesh: tuple[int, int, int], tmp_path: Path) -> None:
    """Copies of the model have slots of their own; matrices, heads and vocabulary are split."""
    words = [
        str(ORACLE / case),
        *map(str, mesh),
        str(tmp_path),
        SCANNED,
        "scheduler.decode_steps=1",
    ]
    command = [sys.executable, "-m", "tests.device.sharded_lora", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert_equal(found, 2e-3)
    assert found["mesh"]["joins"] == found["one"]["joins"] == 8
