"""`scripts/gpu_check` as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.gpu_check import parts
from benchmarks.gpu_check.report import Finding
from tests.benchmarks.bare import ROOT, run_bare


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_fails() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check: needs an NVIDIA GPU, and JAX has cpu\n"


def findings(part: str) -> dict[str, dict[str, Any]]:
    """Of a rehearsal of one part, by name."""
    done = run("--only", part, "--rehearse")
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["failed"] == {}, done.stderr[-2000:]
    return {found["name"]: found for found in record["findings"]}


@pytest.mark.slow
@pytest.mark.in_turn("rehearsals")
def test_a_rehearsal_of_the_kernels_finds_them_right() -> None:
    found = findings("kernels")
    errors = {name: finding for name, finding in found.items() if name.startswith("attention ")}
    assert len(errors) == 20
    assert all(0 < finding["value"] < finding["target"] == 1e-2 for finding in errors.values())
    assert found["cache update: wrong elements"]["value"] == 0
    products = {name: f for name, f in found.items() if " product, " in name}
    assert sorted(products) == sorted(
        f"{kind} product, {num_tokens} tokens: error"
        for kind, tokens in (("int4", (1, 8, 13, 64)), ("fp8", (8, 2048)))
        for num_tokens in tokens
    )
    targets = {"int4": 1e-2, "fp8": 0.06}
    for name, product in products.items():
        assert 0 < product["value"] < product["target"] == targets[name.split()[0]]
    for of in ("int4 product 64x256, 8", "fp8 product 64x256, 8", "fp8 product 64x256, 2048"):
        assert found[f"{of} tokens: times as fast as bfloat16"]["value"] > 0
    assert found["int8 product 64x256, 64 tokens: XLA's share"]["value"] > 0
    assert found["int4 product 64x256, 8 tokens: XLA's share"]["value"] > 0
    assert found["prefill attention 64: share of matmul peak"]["target"] == 0.6
    assert found["copy bandwidth, GB/s"]["value"] > 0


@pytest.mark.slow
@pytest.mark.in_turn("rehearsals")
def test_a_rehearsal_of_the_products_finds_them_right() -> None:
    found = findings("products")
    errors = {name: finding for name, finding in found.items() if name.endswith(": error")}
    assert len(errors) == 7
    assert all(finding["value"] < finding["target"] == 1e-2 for finding in errors.values())
    assert all(finding["value"] > 0 for name, finding in errors.items() if "no rows" not in name)
    beside = [name for name in found if name.startswith(("adapters, 4 rows", "experts, small, 4"))]
    assert beside == [
        "adapters, 4 rows, 2 adapters: ms a step",
        "adapters, 4 rows, 2 adapters: ms a step, XLA",
        "adapters, 4 rows, 2 adapters: share of copy bandwidth",
        "adapters, 4 rows, none: ms a step",
        "adapters, 4 rows, none: ms a step, XLA",
        "adapters, 4 rows, 2 adapters, in one graph: ms a step",
        "adapters, 4 rows, none, in one graph: ms a step",
        "experts, small, 4 tokens: share of copy bandwidth",
        "experts, small, 4 tokens: times as fast as xla",
        "experts, small, 4 tokens: times as fast as ragged_dot",
    ]
    assert found["experts, small, 16 tokens: share of matmul peak"]["value"] > 0


@pytest.mark.slow
@pytest.mark.in_turn("rehearsals")
def test_a_rehearsal_of_the_engine_decodes_and_prefills() -> None:
    found = findings("engine")
    assert found["decode 1: tokens/s"]["value"] > 0 and found["decode 4: tokens/s"]["value"] > 0
    targets = {name: finding["target"] for name, finding in found.items()}
    assert targets["decode 1: MBU"] == 0.8 and targets["chunked prefill 64: MFU"] == 0.55
    assert targets["decode 4: device idle"] == 0.03
    assert found["tokens with CUDA graphs unlike those without"]["value"] == 0


#: A part whose checks are right, wrong, hang, end their process, and are right again.
_PART = """
import os, sys, time
from benchmarks.gpu_check import parts
from benchmarks.gpu_check.parts import Check, perform, share_of
from benchmarks.gpu_check import parts
from benchmarks.gpu_check.report import Finding

memory = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])

def wrong():
    raise ValueError("no such page")

checks = [
    Check("right", lambda: [Finding("a", 1.0)]),
    Check("wrong", wrong),
    Check("hangs", lambda: time.sleep(600)),
    Check("ends", lambda: os._exit(3)),
    Check("right again", lambda: [Finding("b", 2.0, "<", 1.0)]),
    Check("fast", lambda: [Finding("c", memory)], timed=True),
]
parts.SHARES = 1
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("a library's own words")
perform(share_of(checks, words["--share"]), int(words["--first"]))
"""


def test_one_check_takes_no_other_finding_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHARES", 1)  # the others are as many processes more
    monkeypatch.chdir(ROOT)
    command = [sys.executable, "-c", _PART]
    result = parts.run(command, patience=3.0, total=60.0, shared=True)
    assert [(f.name, f.value) for f in result.findings] == [("a", 1.0), ("b", 2.0), ("c", 0.92)]
    assert result.failed.pop("hangs").startswith("not done after ")
    assert result.failed == {
        "wrong": "ValueError: no such page",
        "ends": "its process ended",
    }
    assert set(result.seconds) == {"right", "wrong", "right again", "fast"}


def test_a_bare_image_has_all_that_it_imports() -> None:
    run_bare(
        "import benchmarks.gpu_check.__main__, benchmarks.gpu_check.engine\n"
        "import benchmarks.gpu_check.codes, benchmarks.gpu_check.kernels\n"
        "import benchmarks.gpu_check.products\n"
    )


@pytest.mark.parametrize(
    ("finding", "is_met", "says"),
    [
        (Finding("a", 0.9, ">=", 0.85), True, ">= 0.85 ok"),
        (Finding("a", 0.8, ">=", 0.85), False, ">= 0.85 MISSED"),
        (Finding("a", 0.02, "<", 0.01), False, "< 0.01 MISSED"),
        (Finding("a", float("nan"), ">=", 1.0), False, "MISSED"),
        (Finding("a", 7.0), True, "7"),
    ],
)
def test_which_target_is_missed(finding: Finding, is_met: bool, says: str) -> None:
    assert finding.is_met is is_met
    assert finding.line().rstrip().endswith(says)
