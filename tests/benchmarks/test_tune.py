"""`python -m benchmarks.tune` as far as it goes without an accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.compile_check import targets
from benchmarks.gpu_check import kernels
from benchmarks.tune.cases import OPS, cases
from benchmarks.tune.measure import Case, best, measure, write
from pallas_kernels import UnsupportedKernel, tuning
from pallas_kernels.paged_attention import gpu, reference
from pallas_kernels.paged_attention.tunables import GpuChunks, GpuDecode
from pallas_kernels.tuning import tuned
from tests.benchmarks.bare import ROOT, run_bare

_KIB = 1 << 10
DEFAULT, WRONG = GpuDecode(), GpuDecode(span=128)
SMALL, ROOMLESS = GpuDecode(ring_bytes=64 * _KIB), GpuDecode(ring_bytes=96 * _KIB)
#: The fake clock's seconds: what is wrong, and what does not compile, would be fastest.
SECONDS = {DEFAULT: 3e-6, WRONG: 1e-6, SMALL: 2e-6}
SIZES = kernels.Sizes(rows=1, context=20, num_heads=2, num_kv_heads=1, head_dim=64)


def attend(q: Any, pages: Any, batch: Any) -> Any:
    """The kernel, interpreted: wrong with one candidate, without room with another."""
    chosen = tuned(GpuDecode)
    if chosen == ROOMLESS:
        raise UnsupportedKernel("no room for\na ring of 96 KiB")
    scale, interpret = SIZES.head_dim**-0.5, plgpu.InterpretGPUParams()
    out = gpu.paged_attention(q, pages, 0, batch, scale=scale, interpret=interpret)
    return 1.1 * out if chosen == WRONG else out


def error() -> float:
    """Against the reference."""
    q, pages, batch = kernels.attention_inputs(SIZES, [(1, 7)])
    expected = reference.paged_attention(
        q.astype("float32"), pages, 0, batch, scale=SIZES.head_dim**-0.5
    )
    return kernels.error_of(jax.jit(lambda *given: attend(*given))(q, pages, batch), expected)


CASE = Case(
    kind=GpuDecode,
    where="a row of 20 positions",
    make=partial(kernels.attention_inputs, SIZES, [(1, 20)]),
    run=attend,
    error=error,
)


def clock(*_: Any) -> float:
    return SECONDS[tuned(GpuDecode)]


@pytest.mark.slow
def test_a_rehearsal_chooses_the_fastest_that_is_right_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = list(measure(CASE, [DEFAULT, WRONG, SMALL, ROOMLESS], clock))
    assert [outcome.tunables for outcome in outcomes] == [DEFAULT, WRONG, SMALL, ROOMLESS]
    right, wrong, small, roomless = outcomes
    assert right.us == pytest.approx(3) and small.us == pytest.approx(2)
    assert 0 < right.error < 0.01 and wrong.error == pytest.approx(0.1, abs=0.02)
    assert wrong.problem.startswith("wrong: error 0.1")
    assert roomless.problem == "UnsupportedKernel: no room for a ring of 96 KiB"
    assert roomless.line().endswith(f"ring_bytes={96 * _KIB}: {roomless.problem}")
    chosen = best(outcomes, GpuDecode)
    assert chosen is small

    path = tmp_path / "tuned" / "chip.json"
    told = [outcome.as_dict() for outcome in outcomes]
    kinds = [jax.devices()[0].device_kind]
    write(path, kinds, GpuDecode(), {"date": "2026-01-01", "candidates": []})
    write(path, kinds, chosen.tunables, {"date": "2026-01-02", "candidates": told})
    write(path, kinds, GpuChunks(copiers=1), {"date": "2026-01-03", "candidates": []})
    held = json.loads(path.read_text())["kernels"]
    assert [run["date"] for run in held["gpu_decode"]["measured"]] == ["2026-01-02", "2026-01-01"]
    assert held["gpu_decode"]["measured"][0]["candidates"][3] == {
        "values": {"span": 64, "ring_bytes": 96 * _KIB},
        "problem": roomless.problem,
    }
    monkeypatch.setattr(tuning, "_files", lambda op: {kinds[0]: path})
    assert tuned(GpuDecode) == SMALL
    assert tuned(GpuChunks) == GpuChunks(copiers=1)


def test_a_gain_within_the_noise_changes_nothing() -> None:
    """And a shape at which a candidate makes no other program is not measured twice."""
    case = Case(
        kind=GpuChunks,
        where="none",
        make=lambda: (jax.numpy.ones(3),),
        run=lambda x: x * tuned(GpuChunks).copiers / 4,
        error=lambda: 0.0 if tuned(GpuChunks).copiers == 4 else 1.0,
    )
    seconds = iter([1.0, 0.995])
    candidates = [GpuChunks(), GpuChunks(span=64), GpuChunks(copiers=2)]
    outcomes = list(measure(case, candidates, lambda *_: next(seconds)))
    assert [outcome.problem for outcome in outcomes] == [
        "", "the same program as one before", "wrong: error 1",
    ]  # fmt: skip
    assert next(seconds) == 0.995
    close = [
        type(outcomes[0])(GpuChunks(), us=100.0),
        type(outcomes[0])(GpuChunks(span=64), us=99.5),
    ]
    assert best(close, GpuChunks) is close[0]
    close[1].us = 98.0
    assert best(close, GpuChunks) is close[1]
    assert best([outcomes[1], outcomes[2]], GpuChunks) is None


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.tune", *words]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_an_accelerator_it_says_so_and_fails() -> None:
    done = run("paged_attention", "--write")
    assert (done.returncode, done.stdout) == (2, "")
    says = (
        "tune: needs an accelerator that paged_attention has kernels to tune for, and this is cpu\n"
    )
    assert done.stderr == says


@pytest.mark.slow
@pytest.mark.skipif(targets.missing("gpu") is not None, reason=str(targets.missing("gpu")))
def test_candidates_are_compiled_for_a_chip_that_is_not_here() -> None:
    done = run("quant_matmul", "--compile-only", "--topology", "h100:1")
    assert done.returncode == 0, done.stderr[-2000:]
    head, *lines = done.stdout.splitlines()
    assert head == "quant_matmul gpu, down of Llama 3 8B, 14336 x 4096, 8 tokens"
    assert lines == [f"  ring_bytes={kib << 10}: compiles" for kib in (96, 64, 80)]


def test_every_kernel_with_numbers_has_a_case() -> None:
    kinds = {case.kind for op in OPS for on in ("gpu", "tpu") for case in cases(op, on)}
    files = {file.parent.name: file for file in (ROOT / "pallas_kernels").glob("*/tunables.py")}
    assert set(files) == set(OPS)
    declared = sum(file.read_text().count("(Tunables):") for file in files.values())
    assert len({(kind.OP, kind.KERNEL) for kind in kinds}) == len(kinds) == declared


def test_a_bare_image_has_all_that_it_imports() -> None:
    said = run_bare(
        "import benchmarks.tune.__main__ as main\n"
        "import benchmarks.tune.cases, jaxserve.device.chips\n"
        "print(main._file('paged_attention', 'NVIDIA H100 80GB HBM3')[0].name)\n"
        "print(main._file('paged_attention', 'NVIDIA H100 PCIe'))\n"
    )
    known, other = said.splitlines()
    assert known == "h100.json"
    assert "nvidia-h100-pcie.json'), ['NVIDIA H100 PCIe'])" in other
