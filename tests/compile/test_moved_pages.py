"""Pages on their way to the host and back, compiled for chips that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile_check import targets

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("platform", "model", "slice"),
    [
        ("tpu", "llama-3-8b", "v5e:2x2"),
        ("tpu", "llama-3-8b-int8-fp8-cache", "v5e:1x1"),
        ("gpu", "smollm2-135m", "h100:1"),
    ],
)
def test_moving_pages_copies_no_pool(platform: str, model: str, slice: str) -> None:
    reason = targets.missing(platform)
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.compile.moved_pages", model, slice]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pool"] > 3e9
    assert found["save temp"] < 0.01 * found["pool"]
    assert found["load temp"] < 0.01 * found["pool"]
    assert found["save results"] < 0.1e9 and found["save in place"] == 0
    assert found["load in place"] >= found["pool"]
