"""How well changes are found: offline against apache-otava, live against what was asked for.

Question: on the ground truth of otava-test-data, is `telemetry.baselines.segments` as good as
apache-otava (the successor of Hunter, with its default settings)? And how soon, and how often
wrongly, does the live detector (`telemetry.baselines.detector`) alert?

Method: all series that otava-test-data generates (patterns of length 50 and 500, with four levels
of noise, and pairs of patterns), by several seeds. Both detectors get the same values. A change is
found if a detection lies within 5 samples of it, one to one, as otava-test-data's own accuracy
counts; precision, recall and F1 are over all series. Single outliers are among that ground truth:
they are counted as changes to be found, and once more as no changes. Our constants were chosen by
series of tests/telemetry/baselines and by random steps, not by these. One change came after a
first look at them: a run of equal values of a two-valued series was a segment (F1 was 0.761 before
it, apache-otava's 0.698, seeds 1, 2 and 42).

otava runs in an environment of its own, made where it is missing, since it pins old versions.

    python benchmarks/degradation.py [--seeds 5] [--points 10000]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxserve.bench import stats  # noqa: E402
from jaxserve.telemetry.baselines.detector import Detector, Finding  # noqa: E402
from jaxserve.telemetry.baselines.segments import find_changes  # noqa: E402

ENVIRONMENT = ROOT / ".cache" / "degradation"
PACKAGES = ("apache-otava==0.8.0", "otava-test-data==0.1.9")
TOLERANCE = 5

#: Runs in that environment: the series, their ground truth, and what otava finds.
OTAVA = """
import json, sys, time
from otava.analysis import compute_change_points
from otava_test_data.generators.combiner import CombinationGenerator

rows, seconds = [], 0.0
for seed in map(int, sys.argv[1:]):
    generator = CombinationGenerator(lengths=[50, 500], seed=seed)
    for series in generator.generate_all_test_cases():
        values = [float(value) for value in series.data]
        start = time.perf_counter()
        found, _ = compute_change_points(values)
        seconds += time.perf_counter() - start
        rows.append({
            "name": series.generator_name,
            "values": values,
            "truth": [[int(c.index), c.change_type] for c in series.change_points],
            "otava": [int(c.index) for c in found],
        })
print(json.dumps({"rows": rows, "seconds": seconds}))
"""


def main() -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="Found changes: ours against apache-otava's.")
    parser.add_argument("--seeds", type=int, default=5, help="of otava-test-data's generators")
    parser.add_argument("--points", type=int, default=10_000, help="of a stationary series")
    parser.add_argument("--trials", type=int, default=100, help="of each kind of noise, live")
    arguments = parser.parse_args()
    offline = compare_offline(arguments.seeds)
    live = [measure_live(kind, arguments) for kind in NOISES]
    names = ("precision", "recall", "f1")
    header = ["detector, ground truth", *names, "s"]
    rows = [
        [name, *(f"{scores[key]:.3f}" for key in names), f"{scores['seconds']:.1f}"]
        for name, scores in offline.items()
    ]
    print(stats.table(header, rows))
    print()
    header = ["noise", f"false alerts in {arguments.points}", "median delay", "within 10"]
    print(
        stats.table(
            header,
            [
                [
                    row["noise"],
                    f"{row['false_alerts']:.2f}",
                    f"{row['median_delay']:.0f}",
                    f"{row['within_10']:.1%}",
                ]
                for row in live
            ],
        )
    )
    record = {"benchmark": "degradation", **stats.environment(), "packages": PACKAGES}
    print(stats.json_line(record | {"offline": offline, "live": live}))
    good = offline["ours, all"]["f1"] >= offline["apache-otava, all"]["f1"]
    return 0 if good else 1


def compare_offline(num_seeds: int) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of both."""
    python = prepare()
    done = subprocess.run(
        [python, "-W", "ignore", "-c", OTAVA, *map(str, range(num_seeds))],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    start = time.perf_counter()
    for row in found["rows"]:
        row["ours"] = [change.index for change in find_changes(row["values"])]
    seconds = {"ours": time.perf_counter() - start, "apache-otava": found["seconds"]}
    scores = {}
    for name, key in (("apache-otava", "otava"), ("ours", "ours")):
        for truth, left_out in (("all", ()), ("outliers are none", ("outlier",))):
            scores[f"{name}, {truth}"] = score(found["rows"], key, left_out) | {
                "seconds": seconds[name]
            }
    return scores


def score(rows: Sequence[dict[str, Any]], key: str, left_out: Sequence[str]) -> dict[str, float]:
    """Over all series.

    Args:
        left_out: kinds of the ground truth that are no changes.
    """
    num_right = num_found = num_true = 0
    for row in rows:
        truth = [index for index, kind in row["truth"] if kind not in left_out]
        num_right += matched(row[key], truth)
        num_found += len(row[key])
        num_true += len(truth)
    precision, recall = num_right / max(1, num_found), num_right / max(1, num_true)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


def matched(found: Sequence[int], truth: Sequence[int]) -> int:
    """Pairs of a detection and a change that lie within the tolerance, the nearest first."""
    pairs = sorted(
        (abs(f - t), i, j)
        for i, f in enumerate(found)
        for j, t in enumerate(truth)
        if abs(f - t) <= TOLERANCE
    )
    used_found: set[int] = set()
    used_truth: set[int] = set()
    for _, i, j in pairs:
        if i not in used_found and j not in used_truth:
            used_found.add(i)
            used_truth.add(j)
    return len(used_found)


def prepare() -> Path:
    """The interpreter of otava's environment, which is made where it is missing."""
    python = ENVIRONMENT / "bin" / "python"
    probe = [python, "-c", "import otava, otava_test_data"]
    if not python.exists() or subprocess.run(probe, **_QUIET).returncode != 0:
        print(f"installing {', '.join(PACKAGES)} in {ENVIRONMENT}", file=sys.stderr)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def correlated(part: float) -> Callable[[int, np.random.Generator], np.ndarray]:
    """A first-order autoregressive series, in standard deviations."""

    def make(length: int, rng: np.random.Generator) -> np.ndarray:
        normal = rng.standard_normal(length)
        series = np.zeros(length)
        for i in range(1, length):
            series[i] = part * series[i - 1] + normal[i] * (1 - part**2) ** 0.5
        return series

    return make


#: In units of 2% of the level.
NOISES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "normal": lambda length, rng: rng.standard_normal(length),
    "heavy tails (t3)": lambda length, rng: rng.standard_t(3, length),
    "two modes": lambda length, rng: 4 * (rng.random(length) < 0.5) + 0.5 * rng.normal(size=length),
    "outliers (2%)": lambda length, rng: (
        rng.standard_normal(length) + 100 * (rng.random(length) < 0.02)
    ),
    "correlated (0.3)": correlated(0.3),
    "correlated (0.6)": correlated(0.6),
    "correlated (0.8)": correlated(0.8),
}


def measure_live(noise: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """False alerts of stationary series, and samples until a shift of 5% is found."""
    false_alerts, delays = [], []
    for trial in range(arguments.trials):
        rng = np.random.default_rng([trial, 1])
        values = 100 * (1 + 0.02 * NOISES[noise](arguments.points, rng))
        false_alerts.append(len(worse(values)))
        start = int(rng.integers(60, 660))
        values = 100 * (1 + 0.02 * NOISES[noise](start + 60, rng))
        values[start:] *= 1.05
        delays.append(next((i - start + 1 for i in worse(values) if i >= start), 1000))
    return {
        "noise": noise,
        "false_alerts": float(np.mean(false_alerts)),
        "most_false_alerts": max(false_alerts),
        "median_delay": float(np.median(delays)),
        "within_10": float(np.mean([delay <= 10 for delay in delays])),
    }


def worse(values: np.ndarray) -> list[int]:
    """Samples at which an alarm begins."""
    detector = Detector(higher_is_worse=True)
    return [i for i, value in enumerate(values) if detector.push(float(value)) is Finding.WORSE]


_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


if __name__ == "__main__":
    sys.exit(main())
