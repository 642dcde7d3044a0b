"""`jaxserve bench history FILE…`: where did a long row of results change?

Finds the changes of each figure (`telemetry.baselines.segments`). Exit status: 0, 1 if the newest
change of some figure is for the worse, 2 if the results are of different machines, models, loads or
benchmarks.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from jaxserve.bench import stats
from jaxserve.bench.compare import CANNOT_TELL, WORSE
from jaxserve.bench.figures import differences, figures_of, read_records
from jaxserve.bench.verdict import Verdict
from jaxserve.errors import ConfigError
from jaxserve.telemetry.baselines.segments import find_changes


def main(arguments: argparse.Namespace) -> int:
    """The subcommand; returns its exit status."""
    try:
        return _history(arguments)
    except ConfigError as error:
        print(f"jaxserve bench: {error.message}", file=sys.stderr)
        return CANNOT_TELL


def _history(arguments: argparse.Namespace) -> int:
    records = [record for file in arguments.files for record in read_records(Path(file))]
    if found := differences(records[:1], records[1:]):
        raise ConfigError(f"the runs are no history of one benchmark: {', '.join(found)} differ")
    each = [figures_of([record]) for record in records]
    status, rows, shown = 0, [], []
    for name, figure in each[-1].items():
        values = [run[name].value if name in run else math.nan for run in each]
        changes = find_changes(values, min_shift=arguments.threshold)
        for change in changes:
            worse = None
            if figure.higher_is_better is not None:
                worse = (change.shift > 0) != figure.higher_is_better
            if worse and change is changes[-1]:
                status = WORSE
            commit = str(records[change.index].get("commit"))
            word = {None: "", True: Verdict.WORSE, False: Verdict.BETTER}[worse]
            rows.append([name, commit, f"{change.before:.4g}", f"{change.after:.4g}", word])
            shown.append(
                {"figure": name, "commit": commit, "verdict": word, **dataclasses.asdict(change)}
            )
    if arguments.json:
        print(stats.json_line({"benchmark": "history", "status": status, "changes": shown}))
    else:
        print(stats.table(["figure", "changed at", "before", "after", "verdict"], rows))
    return status
