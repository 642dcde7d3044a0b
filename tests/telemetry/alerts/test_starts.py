"""Deaths are counted, ends are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.telemetry.alerts.starts import FILE, LOOP_S, Starts
from tests.fakes.clock import Clock


def test_deaths_are_counted_until_they_are_long_ago(tmp_path: Path):
    wall = Clock(1e9)
    for number in range(3):
        assert Starts(tmp_path, wall).num_deaths() == number
        wall.advance(10)
    starts = Starts(tmp_path, wall)
    assert starts.num_deaths() == 3
    assert starts.is_loop()
    wall.advance(LOOP_S)
    assert not starts.is_loop()


def test_an_end_is_no_death(tmp_path: Path):
    for _ in range(5):
        Starts(tmp_path, Clock(1e9)).ended()
    assert Starts(tmp_path, Clock(1e9)).num_deaths() == 0


@pytest.mark.parametrize("content", ["{", '{"version": 1, "alive": true, "deaths": "x"}'])
def test_a_broken_file_is_no_reason_to_die(tmp_path: Path, content: str):
    (tmp_path / FILE).write_text(content)
    assert Starts(tmp_path, Clock(1e9)).num_deaths() <= 1


def test_a_disk_that_takes_nothing_is_no_reason_to_die(tmp_path: Path):
    starts = Starts(tmp_path / "missing", Clock(1e9))
    starts.ended()
    assert starts.num_deaths() == 0
