"""Two records side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.bench import cli


def write(file: Path, speeds: list[float], **more: object) -> str:
    case = {"name": "decode 8", "tokens_per_s": sorted(speeds)[1], "tokens_per_s_runs": speeds}
    record = {"benchmark": "engine", "commit": "abc", "cases": [case], **more}
    file.write_text(f"some table\n{json.dumps(record)}\n")
    return str(file)


def test_ratio_and_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a.json", [100.0, 110.0, 90.0], load_and_compile_s=20.0)
    after = write(tmp_path / "b.json", [200.0, 220.0, 180.0], load_and_compile_s=10.0)
    assert cli.run(["compare", before, after]) == 0
    lines = capsys.readouterr().out.splitlines()
    decode = next(line for line in lines if "decode 8" in line)
    assert [cell.strip() for cell in decode.strip("|").split("|")][1:] == [
        "100",
        "200",
        "2.000",
        "2.000-2.000",
    ]
    load = next(line for line in lines if "load_and_compile_s" in line)
    assert "0.500" in load


def test_records_of_two_benchmarks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "a.json", [1.0, 2.0, 3.0])
    other = tmp_path / "b.json"
    other.write_text('{"benchmark": "serve"}\n')
    assert cli.run(["compare", before, str(other)]) == 1
    assert "b.json of bench serve" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "no json", "[1]"])
def test_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    assert cli.run(["compare", str(file), str(file)]) == 1
    assert "does not end in a benchmark's JSON line" in capsys.readouterr().err
