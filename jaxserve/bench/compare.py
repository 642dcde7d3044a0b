"""`jaxserve bench compare A.json B.json`: what changed between two runs of a benchmark.

Reads the JSON lines that benchmarks end in and prints every figure that both have, with its ratio.
Where a run kept its repeats (`bench engine`), the ratio comes with a bootstrap 95% interval; it is
honest only if the two runs were interleaved or the machine was quiet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxserve.bench import stats
from jaxserve.errors import ConfigError


def main(arguments: argparse.Namespace) -> int:
    """The subcommand; returns its exit status."""
    before, after = read_record(Path(arguments.before)), read_record(Path(arguments.after))
    if before.get("benchmark") != after.get("benchmark"):
        raise ConfigError(
            f"{arguments.before} is of bench {before.get('benchmark')}, "
            f"{arguments.after} of bench {after.get('benchmark')}"
        )
    print(f"before: {before.get('commit')}  after: {after.get('commit')}")
    print(stats.table(["figure", "before", "after", "ratio", "95%"], compare(before, after)))
    return 0


def read_record(file: Path) -> dict[str, Any]:
    """The last line of a file, as JSON.

    Raises:
        ConfigError: it is not there, or not a benchmark's record.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8").strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{file} does not end in a benchmark's JSON line: {error}") from error
    if not isinstance(record, dict) or "benchmark" not in record:
        raise ConfigError(f"{file} does not end in a benchmark's JSON line")
    return record


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """Rows of the table: name, both values, ratio, interval."""
    old, new = _figures(before), _figures(after)
    rows = []
    for name, (old_value, old_runs) in old.items():
        new_value, new_runs = new.get(name, (None, []))
        if new_value is None or not old_value:
            continue
        interval = ""
        if len(old_runs) == len(new_runs) and len(old_runs) > 1:
            _, low, high = stats.ratio_interval(new_runs, old_runs)
            interval = f"{low:.3f}-{high:.3f}"
        rows.append(
            [name, f"{old_value:.4g}", f"{new_value:.4g}", f"{new_value / old_value:.3f}", interval]
        )
    return rows


def _figures(record: dict[str, Any]) -> dict[str, tuple[float, list[float]]]:
    """Every number of a record by name, with its repeats where they were kept."""
    figures: dict[str, tuple[float, list[float]]] = {}
    for key, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            figures[key] = (value, [])
        elif isinstance(value, dict) and key.endswith("_ms"):
            figures |= {f"{key} {name}": (number, []) for name, number in value.items()}
    for case in record.get("cases", ()):
        for key in ("tokens_per_s", "step_ms_p50", "step_ms_p99", "mbu", "mfu"):
            if case.get(key) is not None:
                figures[f"{case['name']}: {key}"] = (case[key], case.get(f"{key}_runs", []))
    return figures
