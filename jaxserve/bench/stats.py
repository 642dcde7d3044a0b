"""Percentiles and intervals of measured samples, and the line of JSON that a benchmark ends in.

Used by all benchmarks; plain Python, so that a bare accelerator image runs it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, linear between neighbours.

    Args:
        percent: 0 … 100.

    Returns:
        NaN where there are no samples.
    """
    if not samples:
        return math.nan
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(samples: Sequence[float]) -> float:
    """The middle sample; NaN where there are none."""
    return percentile(samples, 50)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90, p99 and maximum; of no samples, nothing."""
    if not samples:
        return {}
    return {
        "mean": math.fsum(samples) / len(samples),
        "p50": percentile(samples, 50),
        "p90": percentile(samples, 90),
        "p99": percentile(samples, 99),
        "max": max(samples),
    }


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, num_resamples: int = 2000
) -> tuple[float, float, float]:
    """Ratio of the medians of interleaved pairs, with its bootstrap 95% interval.

    Args:
        numerators, denominators: the i-th of each were measured one after the other, so pairs
            are drawn together (Efron 1979, percentile method).

    Returns:
        ratio, low end, high end.
    """
    pairs = _pairs(numerators, denominators)
    random_source = random.Random(0)
    ratios = []
    for _ in range(num_resamples):
        drawn = random_source.choices(pairs, k=len(pairs))
        ratios.append(median([n for n, _ in drawn]) / median([d for _, d in drawn]))
    return (
        median(numerators) / median(denominators),
        percentile(ratios, 2.5),
        percentile(ratios, 97.5),
    )


def pair_ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, num_resamples: int = 2000
) -> tuple[float, float, float]:
    """Median of the ratios of interleaved pairs, with its bootstrap 95% interval.

    What drifts from pair to pair, such as a machine's clock or its other work, divides out; so
    with many short pairs it resolves less than `ratio_interval`.

    Args:
        numerators, denominators: the i-th of each were measured one after the other, in turns.

    Returns:
        ratio, low end, high end.
    """
    ratios = [numerator / other for numerator, other in _pairs(numerators, denominators)]
    random_source = random.Random(0)
    medians = [median(random_source.choices(ratios, k=len(ratios))) for _ in range(num_resamples)]
    return median(ratios), percentile(medians, 2.5), percentile(medians, 97.5)


def _pairs(numerators: Sequence[float], denominators: Sequence[float]) -> list[tuple[float, float]]:
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"pairs are needed, got {len(numerators)} and {len(denominators)} samples")
    return list(zip(numerators, denominators, strict=True))


def environment() -> dict[str, str]:
    """What a figure depends on besides the code's arguments: commit, machine, Python."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
    }


def json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON; NaN and infinities become null, floats keep 6 digits."""
    return json.dumps(_plain(record), separators=(", ", ": "), allow_nan=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    pads: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(header) - 1)]

    def line(cells: Sequence[str]) -> str:
        padded = (pad(c, w) for pad, c, w in zip(pads, cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
