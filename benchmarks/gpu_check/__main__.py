"""`scripts/gpu_check`: what only a GPU can tell, in one command of under nine minutes.

Right first, then how near the limits of the same device in the same run, then ahead of
transformers. Needs JAX, flax and, for the last part, torch and transformers; no network and no
weights.
Four parts, each a process of its own, so that none holds another's memory:

    kernels   attention, cache update and products with codes against their references; their
              shares of the limits
    products  those of adapters and of experts likewise, and against XLA's own
    engine    Llama-3-8B's shape with random weights behind the real scheduler: MBU, MFU, idle time
    torch     the same shape in transformers

A table on stdout and a JSON line behind it. Exit status: 0 where every target is met, 1 where one
is missed or a part failed, 2 without a GPU. `--rehearse` runs small shapes on any device, to see
that the command itself works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu_check.report import Finding

#: Seconds that each part may take, and all of them together.
_PATIENCE = {"kernels": 180, "products": 120, "engine": 210, "torch": 140}
_ALL_PATIENCE = 535


def main() -> int:
    """Runs all parts, or one."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", choices=list(_PATIENCE), help="one part alone, as JSON")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(_part(given.part, given.rehearse)))
        return 0
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu" and not given.rehearse:
        print(f"gpu_check: needs an NVIDIA GPU, and JAX has {device.platform}", file=sys.stderr)
        return 2
    started = time.monotonic()
    results = {}
    for part, patience in _PATIENCE.items():
        left = _ALL_PATIENCE - (time.monotonic() - started)
        results[part] = _run(part, given.rehearse, max(1.0, min(patience, left)))
    findings = [Finding(**found) for result in results.values() for found in result["findings"]]
    findings += _against_torch(results)
    print("\n".join(finding.line() for finding in findings))
    failed = {part: result["error"] for part, result in results.items() if result["error"]}
    missed = [finding.name for finding in findings if not finding.is_met]
    for part, error in failed.items():
        print(f"{part} FAILED: {error}")
    print(f"missed: {'; '.join(missed) or 'nothing'}")
    record = {
        "benchmark": "gpu_check",
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "seconds": round(time.monotonic() - started),
        "rehearsal": given.rehearse,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "missed": missed,
        "failed": failed,
    }
    print(json.dumps(record))
    return 1 if missed or failed else 0


def _run(part: str, rehearse: bool, patience: float) -> dict[str, Any]:
    """A part's findings, or why it has none."""
    words = [sys.executable, "-m", "benchmarks.gpu_check", "--part", part]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    try:
        done = subprocess.run(
            [*words, *(["--rehearse"] if rehearse else [])],
            capture_output=True,
            text=True,
            timeout=patience,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"findings": [], "error": f"not done after {patience:.0f} s"}
    try:
        return {"error": "", **json.loads(done.stdout.splitlines()[-1])}
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"findings": [], "error": " / ".join(lines[-3:])[:500]}


def _part(part: str, rehearse: bool) -> dict[str, Any]:
    if part == "torch":
        from benchmarks.gpu_check import torch_peer

        return torch_peer.measure(rehearse)
    from benchmarks.gpu_check.limits import measure_limits

    limits = measure_limits(1 << 20, 128) if rehearse else measure_limits()
    if part == "kernels":
        from benchmarks.gpu_check import codes, kernels

        sizes = kernels.Sizes()
        if rehearse:
            sizes = kernels.Sizes(rows=2, context=64, prompt=64)
        backend = "xla" if rehearse else "gpu"
        found = list(kernels.check(backend, limits, sizes))
        found += codes.check(backend, limits, *([((64, 256),), 1] if rehearse else []))
        found.append(Finding("copy bandwidth, GB/s", limits.copy / 1e9))
        found.append(Finding("matmul peak, TFLOP/s", limits.matmul / 1e12))
        return {"findings": [dataclasses.asdict(finding) for finding in found]}
    if part == "products":
        from benchmarks.gpu_check import products

        sizes = products.SMALL if rehearse else products.Sizes()
        found = products.check("xla" if rehearse else "gpu", limits, sizes)
        return {"findings": [dataclasses.asdict(finding) for finding in found]}
    from benchmarks.gpu_check import engine

    return engine.measure_engine(limits, rehearse)


def _against_torch(results: dict[str, dict[str, Any]]) -> list[Finding]:
    """How many times as fast decode is, where both were measured."""
    ours = results["engine"].get("tokens_per_s", {})
    theirs = results["torch"].get("tokens_per_s", {})
    return [
        Finding(
            f"decode {rows}: times as fast as transformers", ours[rows] / theirs[rows], ">=", 1.0
        )
        for rows in ours
        if rows in theirs
    ]


if __name__ == "__main__":
    sys.exit(main())
