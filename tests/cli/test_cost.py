"""`jaxserve cost`: its tables, its errors, and its plot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """What a benchmark wrote."""
    record = {
        "benchmark": "serve",
        "prompt_tokens_per_s": 3_000.0,
        "output_tokens_per_s": 1_000.0,
    }
    file = tmp_path / "result.json"
    file.write_text(f"progress\n{json.dumps(record)}\n")
    return file


def test_a_table_says_what_it_supposes(run: Run, result: Path) -> None:
    ended = run("cost", result, "--device", "H100", "--compare", "all", "--utilisation", "0.5")
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert "at 50% utilisation" in lines[0] and "3 input tokens for each output" in lines[0]
    assert lines[4].startswith("| 1 x h100 ") and "| 6.88 |" in " ".join(lines[4].split())
    assert lines[5].startswith("| 1 x h200 *")
    assert "p5.48xlarge" in ended.out and "2026-11-09" in ended.out
    assert "- tpu7x: 12 a chip and hour" in ended.out and "estimate: a pod" in ended.out
    assert "* estimated from h100" in ended.out and "measure before you buy" in ended.out


def test_own_prices(run: Run, result: Path) -> None:
    words = ["--device", "box", "--price", "box=3.6", "--watts", "box=100", "--json"]
    ended = run("cost", result, *words, "--carbon", 400, "--people", 1_000)
    document = json.loads(ended.out)
    (cost,) = document["costs"]
    assert (cost["device"], cost["hardware_per_hour"], cost["watts"]) == ("box", 3.6, 100)
    assert cost["people_per_hour"] == pytest.approx(1_000 / 730.5, rel=1e-5)
    assert cost["carbon_g_per_million"] > 0
    assert (document["currency"], document["prices"]["rent"]) == ("USD", {"box": 3.6})


def test_csv_and_plot(run: Run, result: Path, tmp_path: Path) -> None:
    plot = tmp_path / "cost.svg"
    ended = run("cost", result, "--device", "h200", "--compare", "v5e", "--csv", "--plot", plot)
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    assert [(row["device"], row["estimated"]) for row in rows] == [
        ("h200", "False"),
        ("v5e", "True"),
    ]
    ElementTree.fromstring(plot.read_text())
    assert "all tokens, 1 x h200: 0.549" in plot.read_text()  # 7.912 / 3.6 / 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "abacus"], "'abacus' has no list price here"),
        ([], "'this device' has no list price here"),
        (["--device", "h100", "--compare", "abacus"], "there is no device 'abacus'"),
        (["--device", "h100", "--price", "h100"], "--price takes DEVICE=AMOUNT"),
        (["--device", "h100", "--watts", "h100=-3"], "--watts takes a number above 0"),
        (["--device", "h100", "--utilisation", "1.5"], "--utilisation is a share"),
        (["--device", "h100", "--utilisation", "nan"], "--utilisation takes a number"),
        (["--device", "h100", "--pue", "0.9"], "--pue is 1 or more"),
        (["--device", "h100", "--chips", "-1"], "--chips"),
        (["--device", "h100", "--years", "0"], "--years takes"),
    ],
)
def test_what_is_wrong_is_told(run: Run, result: Path, words: list[str], told: str) -> None:
    ended = run("cost", result, *words)
    assert ended.status == 2 and ended.out == ""
    assert told in ended.err and len(ended.err.splitlines()) == 1


def test_a_file_that_is_no_result(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nothing\n")
    assert "does not end in a benchmark" in run("cost", tmp_path / "x").err
    assert run("cost", tmp_path / "y").status == 2


def test_what_cannot_be_scaled_is_told(run: Run, result: Path) -> None:
    ended = run("cost", result, "--device", "box", "--price", "box=1", "--compare", "h100")
    assert ended.status == 0 and "cannot be scaled" in ended.err
