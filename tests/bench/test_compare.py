"""Two sides' records, their verdict, and the exit status."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jaxserve.bench import cli

SAME = {"benchmark": "engine", "commit": "abc", "device": "1 x cpu", "model": "m"}


def write(file: Path, speeds: list[float], **more: object) -> str:
    """A run that kept its repeats."""
    case = {"name": "decode 8", "tokens_per_s": sorted(speeds)[1], "tokens_per_s_runs": speeds}
    record = SAME | {"cases": [case], **more}
    file.write_text(f"some table\n{json.dumps(record)}\n")
    return str(file)


def write_runs(file: Path, figures: dict[str, list[float]], **more: object) -> str:
    """Several runs, a line each."""
    rows = [
        dict(zip(figures, values, strict=True)) for values in zip(*figures.values(), strict=True)
    ]
    file.write_text("".join(f"{json.dumps(SAME | row | more)}\n" for row in rows))
    return str(file)


def noisy(center: float, number: int, seed: int, spread: float = 0.02) -> list[float]:
    chance = random.Random(seed)
    return [center * (1 + spread * chance.gauss(0, 1)) for _ in range(number)]


def verdicts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    record = json.loads(capsys.readouterr().out)
    assert record["benchmark"] == "compare"
    return {figure["name"]: figure["verdict"] for figure in record["figures"]}


def test_ratio_and_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a.json", [100.0, 110.0, 90.0], load_and_compile_s=20.0)
    after = write(tmp_path / "b.json", [200.0, 220.0, 180.0], load_and_compile_s=10.0)
    assert cli.run(["compare", before, after, "--paired"]) == 0
    lines = capsys.readouterr().out.splitlines()
    decode = next(line for line in lines if "decode 8" in line)
    assert [cell.strip() for cell in decode.strip("|").split("|")][1:] == [
        *("100", "200", "2.000", "2.000-2.000"),
        *("0.25", "unsure"),  # three pairs cannot say more
    ]
    load = next(line for line in lines if "load_and_compile_s" in line)
    assert "0.500" in load


@pytest.mark.parametrize(
    ("factor", "status", "verdict"), [(0.9, 1, "worse"), (1.0, 0, "same"), (1.1, 0, "better")]
)
def test_a_verdict_and_its_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, status: int, verdict: str
) -> None:
    before = write(tmp_path / "a.json", noisy(100, 10, 1, 0.01))
    after = write(tmp_path / "b.json", noisy(100 * factor, 10, 2, 0.01))
    assert cli.run(["compare", before, after, "--json"]) == status
    assert verdicts(capsys) == {"decode 8: tokens_per_s": verdict}


def test_lower_is_better_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("e2e_ms", "output_tokens_per_s", "requests", "read_bytes_per_s")
    before = write_runs(tmp_path / "a.json", {n: noisy(100, 12, i) for i, n in enumerate(names)})
    after = write_runs(
        tmp_path / "b.json", {n: noisy(120, 12, 10 + i) for i, n in enumerate(names)}
    )
    assert cli.run(["compare", before, after, "--json"]) == 1
    assert verdicts(capsys) == {
        "e2e_ms": "worse",
        "output_tokens_per_s": "better",
        "requests": "unjudged",
        "read_bytes_per_s": "unjudged",
    }


def test_less_than_the_threshold_does_not_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "a.json", noisy(100, 40, 1, 0.002))
    after = write(tmp_path / "b.json", noisy(98, 40, 2, 0.002))
    assert cli.run(["compare", before, after, "--json"]) == 0
    assert verdicts(capsys) == {"decode 8: tokens_per_s": "same"}
    assert cli.run(["compare", before, after, "--json", "--threshold", "0.01"]) == 1


def test_of_many_figures_that_have_not_changed_seldom_one_is_worse(tmp_path: Path) -> None:
    """The chance of any false verdict in a comparison of 8 figures, each of 6 runs."""
    wrong = 0
    for seed in range(30):
        sides = [
            write_runs(
                tmp_path / f"{side}.json",
                {f"f{i}_ms": noisy(100, 6, 10_000 * seed + 100 * i + side, 0.1) for i in range(8)},
            )
            for side in (0, 1)
        ]
        wrong += cli.run(["compare", *sides, "--json"]) == 1
    assert wrong <= 4  # 5% of 30 is 1.5; more than 4 come in 2 of 100 trials


def test_outliers_make_nothing_worse(tmp_path: Path) -> None:
    before = write(tmp_path / "a.json", noisy(100, 10, 1))
    after = write(tmp_path / "b.json", [*noisy(100, 9, 2), 20.0])
    assert cli.run(["compare", before, after]) == 0


@pytest.mark.parametrize("field", ["device", "model", "processor", "concurrency"])
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    before = write(tmp_path / "a.json", noisy(100, 10, 1))
    after = write(tmp_path / "b.json", noisy(100, 10, 2), **{field: "another"})
    assert cli.run(["compare", before, after]) == 2
    assert f"{field} is" in capsys.readouterr().err
    assert cli.run(["compare", before, after, "--across", field]) == 0


def test_settings_that_differ_are_named_and_new_ones_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"model": {"path": "/a"}, "scheduler": {"max_rows": 8}, "http": {"port": 1}}
    new = {"model": {"path": "/b"}, "scheduler": {"max_rows": 8, "new": 1}, "http": {"port": 2}}
    before = write(tmp_path / "a.json", noisy(100, 10, 1), config=old)
    after = write(tmp_path / "b.json", noisy(100, 10, 2), config=new)
    assert cli.run(["compare", before, after]) == 0
    capsys.readouterr()
    new["scheduler"]["max_rows"] = 16
    after = write(tmp_path / "b.json", noisy(100, 10, 2), config=new)
    assert cli.run(["compare", before, after]) == 2
    assert "scheduler.max_rows is 8 and 16" in capsys.readouterr().err


def test_records_of_two_benchmarks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "a.json", [1.0, 2.0, 3.0])
    other = tmp_path / "b.json"
    other.write_text('{"benchmark": "serve"}\n')
    assert cli.run(["compare", before, str(other)]) == 2
    assert "benchmark is 'engine' and 'serve'" in capsys.readouterr().err


def test_too_few_repeats_are_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_runs(tmp_path / f"{i}.json", {"e2e_ms": [100.0 + i] * 2}) for i in (0, 1)]
    assert cli.run(["compare", *files]) == 2
    shown = capsys.readouterr()
    assert "e2e_ms" in shown.out  # the figures are there all the same
    assert "3 repeats" in shown.err


@pytest.mark.parametrize("content", ["", "no json", "[1]"])
def test_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    assert cli.run(["compare", str(file), str(file)]) == 2
    assert "does not end in a benchmark's JSON line" in capsys.readouterr().err


def test_a_history_says_where_it_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = [*noisy(100, 20, 1), *noisy(88, 15, 2)]
    files = []
    for number, speed in enumerate(speeds):
        files.append(
            write_runs(tmp_path / f"{number}.json", {"x_per_s": [speed]}, commit=f"c{number}")
        )
    assert cli.run(["history", *files, "--json"]) == 1
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert (change["figure"], change["verdict"]) == ("x_per_s", "worse")
    assert change["commit"] in ("c19", "c20", "c21")
    assert cli.run(["history", *files[:20]]) == 0
    assert cli.run(["history", *files[::-1]]) == 0  # the newest change is for the better
    assert "better" in capsys.readouterr().out


def test_a_history_of_two_machines_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_runs(tmp_path / "a.json", {"x_per_s": [1.0] * 9})
    other = write_runs(tmp_path / "b.json", {"x_per_s": [1.0] * 9}, device="another")
    assert cli.run(["history", one, other]) == 2
    assert "device differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken",
    [{"cases": None}, {"cases": ["x"]}, {"cases": [{"tokens_per_s": 1}]}, {"e2e_ms": {"p50": "x"}}],
)
def test_a_record_of_another_shape_cannot_be_told(tmp_path: Path, broken: dict) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(SAME | broken))
    assert cli.run(["compare", str(file), str(file)]) == 2
