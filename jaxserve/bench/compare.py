"""`jaxserve bench compare BASE NEW`: did it get worse? For people and for CI.

Judges every figure that both have by its repeats (`verdict`). Exit status: 0 if nothing is worse, 1
if something is, 2 if it cannot be told: the runs are of different machines, models, loads or
benchmarks, or have too few repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from jaxserve.bench import stats
from jaxserve.bench.figures import differences, figures_of, read_records, value_of
from jaxserve.bench.verdict import MIN_REPEATS, Comparison, Verdict, judge
from jaxserve.errors import ConfigError

WORSE = 1
CANNOT_TELL = 2


def main(arguments: argparse.Namespace) -> int:
    """The subcommand; returns its exit status."""
    try:
        return _compare(arguments)
    except ConfigError as error:
        print(f"jaxserve bench: {error.message}", file=sys.stderr)
        return CANNOT_TELL


def _compare(arguments: argparse.Namespace) -> int:
    before = read_records(Path(arguments.before))
    after = read_records(Path(arguments.after))
    across = {field.strip() for field in arguments.across.split(",")}
    if found := [field for field in differences(before, after) if field not in across]:
        shown = "; ".join(
            f"{field} is {_short(value_of(before[-1], field))} and "
            f"{_short(value_of(after[-1], field))}"
            for field in found
        )
        raise ConfigError(f"the runs cannot be compared: {shown} (--across {','.join(found)})")
    try:
        figures = figures_of(before), figures_of(after)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"a benchmark's record cannot be read: {error!r}") from error
    comparisons = judge(
        *figures,
        threshold=arguments.threshold,
        alpha=arguments.alpha,
        paired=arguments.paired,
    )
    verdicts = [comparison.verdict for comparison in comparisons]
    if Verdict.WORSE in verdicts:
        status = WORSE
    else:
        status = 0 if any(v is not Verdict.UNJUDGED for v in verdicts) else CANNOT_TELL
    commits = before[-1].get("commit"), after[-1].get("commit")
    if arguments.json:
        record = {
            "benchmark": "compare",
            "of": before[-1]["benchmark"],
            "commits": commits,
            "status": status,
            "threshold": arguments.threshold,
            "alpha": arguments.alpha,
            "figures": [dataclasses.asdict(comparison) for comparison in comparisons],
        }
        print(stats.json_line(record))
    else:
        print(f"before: {commits[0]}  after: {commits[1]}")
        print(_table(comparisons))
    if status == CANNOT_TELL:
        raise ConfigError(
            f"no figure has {MIN_REPEATS} repeats on both sides; give files with the lines of "
            "several runs (or bench engine --repeats)"
        )
    return status


def _table(comparisons: list[Comparison]) -> str:
    header = ["figure", "before", "after", "ratio", "95%", "p", "verdict"]
    rows = []
    for c in comparisons:
        interval = f"{c.low:.3f}-{c.high:.3f}" if c.low == c.low else ""
        p_value = f"{c.p_value:.3g}" if c.p_value == c.p_value else ""
        verdict = "" if c.verdict is Verdict.UNJUDGED else c.verdict
        values = [f"{c.before:.4g}", f"{c.after:.4g}", f"{c.ratio:.3f}"]
        rows.append([c.name, *values, interval, p_value, verdict])
    return stats.table(header, rows)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
