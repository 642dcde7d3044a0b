"""`python -m benchmarks.tune OP`: which numbers of an operation's kernels are fastest on this chip?

    python -m benchmarks.tune paged_attention             a line each candidate of each kernel
    python -m benchmarks.tune paged_attention --write     and pallas_kernels/<op>/tuned/<chip>.json
    python -m benchmarks.tune paged_attention --compile-only --topology h100:1

Candidates are those of `<op>/tunables.py`. Each is compiled, held against the reference on small
inputs and against the others at the shape that is timed, and timed there as `scripts/gpu_check`
does; the fastest right one is chosen, or the defaults where it gains less than a hundredth. Lines
come as they are known, so that a candidate that hangs takes none with it. A choice is made at one
shape: `scripts/compile_check OP/` tells whether all others compile with it, too.

Exit status: 0, 1 where no candidate of a kernel counts, 2 where there is nothing to measure on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Measures, or compiles only."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("op", metavar="OP")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--topology", metavar="CHIP:SHAPE")
    given = parser.parse_args()
    if given.compile_only != bool(given.topology) or (given.compile_only and given.write):
        parser.error("--compile-only goes with --topology and not with --write")
    target, platform = _target(given.topology) if given.compile_only else (None, "")
    import jax

    from benchmarks.tune.cases import OPS, cases
    from benchmarks.tune.measure import best, measure, write

    if given.op not in OPS:
        parser.error(f"{given.op!r} has nothing to tune: there are {', '.join(OPS)}")
    device = jax.devices()[0]
    platform = platform or device.platform
    found = list(cases(given.op, platform)) if platform in ("gpu", "tpu") else []
    if not found:
        there = f"{given.op} has kernels to tune for, and this is {platform}"
        print(f"tune: needs an accelerator that {there}", file=sys.stderr)
        return 2
    failed = False
    for case in found:
        print(f"{case.kind.OP} {case.kind.KERNEL}, {case.where}")
        outcomes = []
        for outcome in measure(case, target=target):
            outcomes.append(outcome)
            print("  " + outcome.line(), flush=True)
        chosen = best(outcomes, case.kind)
        failed |= chosen is None
        if chosen is None or target is not None:
            continue
        print("  chosen: " + chosen.line(), flush=True)
        run = {**_provenance(device), "where": case.where}
        run["candidates"] = [outcome.as_dict() for outcome in outcomes]
        if given.write:
            path, kinds = _file(given.op, device.device_kind)
            write(path, kinds, chosen.tunables, run)
            print(f"  written to {path.relative_to(_ROOT)}")
        print(json.dumps({"benchmark": "tune", "kernel": case.kind.KERNEL, **run}))
    return int(failed)


def _target(topology: str) -> tuple[Any, str]:
    """What to compile for, and its platform; before JAX is imported."""
    from benchmarks.compile_check import targets

    targets.prepare()
    from benchmarks.compile_check.check import compile_for
    from benchmarks.tune.measure import Target
    from jaxserve.device.chips import parse_slice

    slice = parse_slice(topology)
    if reason := targets.missing(slice.chip.platform):
        sys.exit(f"tune: {reason}")
    mesh = targets.mesh(slice, targets.one_each(slice))
    return Target(mesh, targets.platforms(slice), compile_for), slice.chip.platform


def _file(op: str, kind: str) -> tuple[Path, list[str]]:
    """Of a chip, and what JAX calls its devices."""
    from jaxserve.device.chips import CHIPS

    known = next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
    name = known.name if known else "-".join(kind.lower().split())
    path = _ROOT / "pallas_kernels" / op / "tuned" / f"{name}.json"
    return path, list(known.kinds) if known else [kind]


def _provenance(device: Any) -> dict[str, Any]:
    import jax

    words = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "versions": f"jax {jax.__version__}, {' '.join(device.client.platform_version.split())}",
        "commit": told.stdout.strip() or None,
    }


if __name__ == "__main__":
    sys.exit(main())
