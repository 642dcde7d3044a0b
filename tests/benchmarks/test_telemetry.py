"""The benchmark of what watching costs, a little of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_part_is_measured_or_said_to_be_missing() -> None:
    words = ["observer", "vllm", "--rounds", "2", "--streams", "4", "--tokens", "8"]
    done = subprocess.run(
        [sys.executable, "benchmarks/telemetry.py", *words, "--step-ms", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert set(record["parts"]) | set(record["left_out"]) == {"observer", "vllm"}
    observer = record["parts"]["observer"]
    assert observer["off_us_a_token"] > 0 and observer["on_tokens_per_s"] > 0
    assert observer["observer_us_a_token"] > 0  # it had something to do
    ratio, low, high = observer["serving_ratio"]
    assert low <= ratio <= high
    assert record["parts"]["vllm"]["observer_us_a_token"] == 0
