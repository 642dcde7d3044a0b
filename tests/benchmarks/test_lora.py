"""The benchmark of adapters, a little of it, with a small model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import lora
from tests.models.loading import ORACLE

SETTINGS = (
    f"model.path={ORACLE / 'llama3'}",
    "model.served_name=tiny",
    "cache.memory_bytes=0",
    "model.max_context=64",
    "cache.num_pages=100",
    "scheduler.max_step_tokens=8",
    "scheduler.decode_steps=1",
    "kernels.layers=scanned",
)
COUNTS = {
    "rows": 2,
    "tokens": 8,
    "rounds": 2,
    "rank": 8,
    "adapters": 2,
    "registered": 20,
    "requests": 30,
}


@pytest.mark.slow
def test_arms_and_random_traffic_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [f"--{name}={count}" for name, count in COUNTS.items()]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["lora", *words, "--plot", str(tmp_path / "plots")])
    assert lora.main() == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    arms = record["arms"]
    assert list(arms) == ["off", "base", "one", "mixed"]
    for arm in arms.values():
        assert arm["step_ms"] > 0 and arm["tokens_per_s"] > 0
        assert arm["low"] <= arm["ratio"] <= arm["high"]
        assert arm["beyond_low"] <= arm["beyond_bound"] <= arm["beyond_high"]
    assert (arms["off"]["ratio"], arms["off"]["bound_ms"], arms["base"]["bound_ms"]) == (1, 0, 0)
    # Two matrices of rank 8 in float32 on each of seven modules in three layers.
    sizes = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 112)
    assert record["adapter_bytes"] == 8 * 4 * 3 * sizes
    assert arms["mixed"]["bound_ms"] == pytest.approx(2 * arms["one"]["bound_ms"], rel=1e-3)
    assert arms["one"]["beyond_bound"] < arms["one"]["ratio"]
    churn = record["churn"]
    assert (churn["requests"], churn["dropped"], churn["compiled"]) == (30, 0, 0)
    assert 0 < churn["hit_rate"] < 1 and 2 < churn["loads"] <= 30
    assert record["compiled"] == 0
    assert f"hit_rate {churn['hit_rate']:g}" in out
    root = ElementTree.parse(tmp_path / "plots" / "lora.svg").getroot()
    said = {text.text for text in root.iter() if text.text}
    assert {"slots, unused", "1 adapter", "2 adapters"} <= said
    assert any("2 sequences" in text and "tiny" in text for text in said)
