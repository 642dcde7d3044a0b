"""`scripts/gpu_check`: what only a GPU can tell, in one command of under nine minutes.

Right first, then how near the limits of the same device in the same run, then ahead of
transformers. Needs JAX, flax and, for the last part, torch and transformers; no network and no
weights.
Four parts, each in processes of its own, so that none holds another's memory, and so that a kernel
that hangs or ends its process takes no other finding with it (see `parts`):

    kernels   attention, cache update and products with codes against their references; their
              shares of the limits
    products  those of adapters and of experts likewise, and against XLA's own
    engine    Llama-3-8B's shape with random weights behind the real scheduler: MBU, MFU, idle time;
              the same tokens with CUDA graphs and without
    torch     the same shape in transformers

A table on stdout and a JSON line behind it. Exit status: 0 where every target is met, 1 where one
is missed or a check failed, 2 without a GPU. `--rehearse` runs small shapes on any device, to see
that the command itself works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterable

from benchmarks.gpu_check.parts import Check, Result, perform, run, share_of
from benchmarks.gpu_check.report import Finding

#: Seconds that one check of each part may take, and all of the part's.
_PATIENCE = {"kernels": (60, 180), "products": (60, 140), "engine": (210, 270), "torch": (140, 140)}
_ALL_PATIENCE = 535


def main() -> int:
    """Runs all parts, or what was asked for."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", default=",".join(_PATIENCE), help="parts, by commas")
    parser.add_argument("--part", choices=list(_PATIENCE), help=argparse.SUPPRESS)
    parser.add_argument("--share", default="timed", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        perform(share_of(_checks(given.part, given.rehearse), given.share), given.first)
        return 0
    parts = given.only.split(",")
    unknown = sorted(set(parts) - set(_PATIENCE))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(_PATIENCE)}")
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu" and not given.rehearse:
        print(f"gpu_check: needs an NVIDIA GPU, and JAX has {device.platform}", file=sys.stderr)
        return 2
    started = time.monotonic()
    results: dict[str, Result] = {}
    for part in parts:
        patience, total = _PATIENCE[part]
        left = max(1.0, _ALL_PATIENCE - (time.monotonic() - started))
        words = [sys.executable, "-m", "benchmarks.gpu_check", "--part", part]
        words += ["--rehearse"] if given.rehearse else []
        shared = part != "torch"
        results[part] = run(words, patience, min(total, left), shared=shared)
    findings = [finding for result in results.values() for finding in result.findings]
    findings += _against_torch(findings)
    failed = {name: why for result in results.values() for name, why in result.failed.items()}
    missed = [finding.name for finding in findings if not finding.is_met]
    print("\n".join(finding.line() for finding in findings))
    for name, why in failed.items():
        print(f"{name} FAILED: {why}")
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
        "seconds_by_check": {part: result.seconds for part, result in results.items()},
    }
    print(json.dumps(record))
    return 1 if missed or failed else 0


def _checks(part: str, rehearse: bool) -> Iterable[Check]:
    """A part's checks; their modules and the limits are not needed before."""
    if part == "torch":
        from benchmarks.gpu_check import torch_peer

        return [Check("transformers", functools.partial(torch_peer.measure, rehearse), timed=True)]
    from benchmarks.gpu_check.limits import Limits, measure_limits

    @functools.cache
    def limits() -> Limits:
        return measure_limits(1 << 20, 128) if rehearse else measure_limits()

    backend = "xla" if rehearse else "gpu"
    if part == "kernels":
        from benchmarks.gpu_check import codes, kernels

        small = kernels.Sizes(rows=2, context=64, prompt=64)
        sizes = small if rehearse else kernels.Sizes()
        return [
            *kernels.checks(backend, limits, sizes),
            *(
                codes.checks(backend, limits, ((64, 256),), 1)
                if rehearse
                else codes.checks(backend, limits)
            ),
            Check("limits", lambda: limits().findings(), timed=True),
        ]
    if part == "products":
        from benchmarks.gpu_check import products

        return products.checks(backend, limits, products.SMALL if rehearse else products.Sizes())
    from benchmarks.gpu_check import engine

    whole = functools.partial(engine.measure_engine, limits, rehearse)
    graphs = functools.partial(engine.compare_graphs, rehearse)
    return [Check("whole model", whole, timed=True), Check("CUDA graphs", graphs)]


def _against_torch(findings: list[Finding]) -> list[Finding]:
    """How many times as fast decode is, where both were measured."""
    values = {finding.name: finding.value for finding in findings}
    return [
        Finding(f"{name[:-10]}: times as fast as transformers", value / theirs, ">=", 1.0)
        for name, value in values.items()
        if name.endswith(": tokens/s") and (theirs := values.get(f"transformers, {name}"))
    ]


if __name__ == "__main__":
    sys.exit(main())
