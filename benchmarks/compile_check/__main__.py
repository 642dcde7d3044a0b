"""Compiles kernels and whole steps for chips that are not here: `scripts/compile_check`.

    scripts/compile_check [PATTERN ...]      rows whose names hold one of the patterns; all without
    scripts/compile_check --part 2/7         every seventh row, from the second on
    scripts/compile_check --changed 24       rows that the commits of the last 24 hours concern
    scripts/compile_check --table            puts each into docs/performance.md's table as it ends
    scripts/compile_check --missing          whole steps that the table has no row of
    scripts/compile_check --list             names only

One JSON line a row on stdout, a summary on stderr. Exit status 1 where a row is not as expected.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.compile_check import targets
from benchmarks.compile_check.changed import files_changed, patterns


def main() -> int:
    """Runs the rows that were asked for."""
    parser = argparse.ArgumentParser(prog="scripts/compile_check", description=__doc__)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--changed", type=float, metavar="HOURS")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--missing", action="store_true")
    given = parser.parse_args()
    targets.prepare()
    from benchmarks.compile_check.check import check
    from benchmarks.compile_check.grouped import ROWS_OF_GROUPED
    from benchmarks.compile_check.kernels import ROWS_OF_KERNELS
    from benchmarks.compile_check.lora import ROWS_OF_LORA
    from benchmarks.compile_check.quant import ROWS_OF_QUANT
    from benchmarks.compile_check.steps import ROWS_OF_STEPS
    from benchmarks.compile_check.table import missing_steps, write_table
    from jaxserve.device.chips import parse_slice

    first, parts = map(int, given.part.split("/"))
    kernels = *ROWS_OF_KERNELS, *ROWS_OF_LORA, *ROWS_OF_GROUPED, *ROWS_OF_QUANT
    rows = _named([*kernels, *ROWS_OF_STEPS], given.patterns)
    if given.changed is not None:
        concerned = patterns(files_changed(given.changed))
        rows = _named(rows, concerned) if concerned else []
    if given.missing:
        absent = missing_steps()
        rows = [row for row in rows if row.name in absent]
    rows = rows[first - 1 :: parts]
    if given.list:
        print("\n".join(row.name for row in rows))
        return 0
    results = []
    for row in rows:
        reason = targets.missing(parse_slice(row.slice).chip.platform)
        if reason is not None:
            sys.exit(f"compile_check: {reason}")
        results.append(check(row))
        print(json.dumps(results[-1].as_dict()), flush=True)
        if given.table:
            write_table(results[-1:])
    wrong = [result for result in results if not result.holds]
    for result in wrong:
        reasons = "; ".join([*result.faults, result.detail])
        print(f"{result.name}: {result.verdict}, not {result.expected}: {reasons}", file=sys.stderr)
    print(f"compile_check: {len(results) - len(wrong)} of {len(results)} hold", file=sys.stderr)
    return 1 if wrong or not results else 0


def _named(rows: list[Any], patterns: list[str]) -> list[Any]:
    """The rows whose names hold one of the patterns; all without patterns."""
    return [row for row in rows if not patterns or any(p in row.name for p in patterns)]


if __name__ == "__main__":
    sys.exit(main())
