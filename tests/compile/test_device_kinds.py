"""What JAX calls the chips of `device.chips`: asked of the compilers themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile_check import targets
from jaxserve.device.chips import CHIPS, device_info

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from benchmarks.compile_check import targets
targets.prepare()
from jaxserve.device.chips import parse_slice
print("kind:", targets.devices(parse_slice(sys.argv[1]))[0].device_kind)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slice"),
    [("v5e", "v5e:1x1"), ("v6e", "v6e:1x1"), ("tpu7x", "tpu7x:2x2x1"), ("h100", "h100:1")],
)
def test_peaks_are_found_by_what_jax_calls_the_device(name: str, slice: str) -> None:
    chip = CHIPS[name]
    if reason := targets.missing(chip.platform):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, slice], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (kind,) = (
        line.removeprefix("kind: ")
        for line in done.stdout.splitlines()
        if line.startswith("kind: ")
    )
    found = device_info(kind, 1)
    assert (found.flops_per_s, found.bytes_per_s) == (chip.flops, chip.bandwidth), kind
