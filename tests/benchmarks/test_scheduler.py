"""The benchmark of planning, a few steps of it."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator

import pytest

from benchmarks import scheduler


@pytest.fixture
def python_collects() -> Iterator[None]:
    """The collector is Python's own again afterwards."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("python_collects")
@pytest.mark.parametrize("words", [[], ["--prefix"]])
def test_each_policy_is_measured_at_each_length_of_the_queue(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "16", "--waiting", "200", "--max-steps", "60", "--step-tokens", "256"]
    monkeypatch.setattr(sys, "argv", ["scheduler", *sizes, "--slowest", *words])
    scheduler.main()
    out = capsys.readouterr().out
    assert out.count("slowest 0.1%") == 9
    record = json.loads(out.splitlines()[-1])
    arms = record["arms"]
    assert [(arm["fairness"], arm["waiting"]) for arm in arms] == [
        (policy, waiting) for policy in ("vtc", "fcfs", "locality") for waiting in (0, 2, 200)
    ]
    for arm in arms:
        assert 0 < arm["plan_p50"] <= arm["plan_p99"] <= arm["plan_max"]
        assert 0 < arm["plan_clock_p50"] <= arm["plan_clock_p99"] <= arm["plan_clock_max"]
        assert 0 < arm["commit_p50"] <= arm["commit_p99"]
        assert arm["steps"] == 60 and arm["requests"] > 20
        assert arm["least_served"] <= 1 <= arm["most_served"]
        assert arm["goodput_per_s"] > 0
