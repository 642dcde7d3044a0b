"""The figures of benchmarks' records, and which of them are good when they are high.

A file holds the JSON line of one run, or the lines of several of the same, which are its repeats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.bench.verdict import Figure
from jaxserve.errors import ConfigError

#: What both sides must have in common, so that a difference is one of the code.
SAME = (
    *("benchmark", "machine", "processor", "device", "model"),
    *("rate", "concurrency", "prompt_tokens", "output_tokens", "seed"),
)
#: Sections of the configuration that count among it.
_SECTIONS = ("weights", "cache", "scheduler", "kernels", "parallel", "engine", "lora")
#: Keys of a case, and whether high is good. mbu and mfu follow from tokens_per_s: shown only.
_CASE_KEYS: dict[str, bool | None] = {
    "tokens_per_s": True,
    "step_ms_p50": False,
    "step_ms_p99": False,
    "mbu": None,
    "mfu": None,
}
_HIGH_IS_GOOD = ("_per_s", "goodput")
_LOW_IS_GOOD = ("_ms", "_s", "_bytes", "compiles_after_warmup", "truncated")
#: Of the machine, and of the load that was asked for.
_NO_VERDICT = ("read_bytes_per_s", "matmul_flops_per_s", "prompt_tokens_per_s", "max_lateness_ms")


def read_records(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that are benchmarks' records, oldest first.

    Raises:
        ConfigError: it is not there, or there is none at its end.
    """
    try:
        lines = file.read_text(encoding="utf-8").strip().splitlines()
        last = json.loads(lines[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{file} does not end in a benchmark's JSON line: {error}") from error
    if not isinstance(last, dict) or "benchmark" not in last:
        raise ConfigError(f"{file} does not end in a benchmark's JSON line")
    records = []
    for line in lines:
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a log's line
            if isinstance(record, dict) and record.get("benchmark") == last["benchmark"]:
                records.append(record)
    return records


def figures_of(records: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Every number by name, with its value in each repeat."""
    figures: dict[str, Figure] = {}

    def add(name: str, values: Sequence[float | None], higher_is_better: bool | None) -> None:
        figure = figures.setdefault(name, Figure(samples=[], higher_is_better=higher_is_better))
        figure.samples.extend(float(value) for value in values if value is not None)

    for record in records:
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in SAME:
                add(key, [value], direction(key))
            elif isinstance(value, dict) and key.endswith("_ms"):
                for name, number in value.items():
                    add(f"{key} {name}", [number], False)
        for case in record.get("cases", ()):
            for key, higher_is_better in _CASE_KEYS.items():
                values = case.get(f"{key}_runs") or [case.get(key)]
                add(f"{case['name']}: {key}", values, higher_is_better)
    return {name: figure for name, figure in figures.items() if figure.samples}


def direction(key: str) -> bool | None:
    """Whether a figure is good when it is high; None where nobody can say."""
    if key in _NO_VERDICT:
        return None
    if key.endswith(_HIGH_IS_GOOD):
        return True
    return False if key.endswith(_LOW_IS_GOOD) else None


def differences(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps two sides from being compared: names of fields of SAME, or of settings.

    Of settings those count that both have and that decide how fast the engine is: a newer version
    may have more of them, and directories differ between machines.
    """
    first, *others = (*before, *after)
    found = [key for key in SAME if any(other.get(key) != first.get(key) for other in others)]
    settings = _settings(first)
    for other in map(_settings, others):
        found += [key for key in settings.keys() & other.keys() if settings[key] != other[key]]
    return sorted(set(found), key=found.index)


def value_of(record: dict[str, Any], field: str) -> Any:
    """Of a name that `differences` returned."""
    return _settings(record).get(field, record.get(field))


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    config = record.get("config")
    if not isinstance(config, dict):
        return {}
    return {
        f"{section}.{key}": value
        for section in _SECTIONS
        for key, value in (config.get(section) or {}).items()
    }
