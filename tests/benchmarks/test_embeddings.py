"""The benchmark of embeddings: its texts are the same on every run, its figures are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.embeddings import make_texts, plot, show

RESULTS = {
    "throughput": {
        "texts_per_s": 190.0,
        "peer_texts_per_s": 85.0,
        "ratio": 2.23,
        "interval": (2.0, 2.4),
    },
    "idle": {
        "tokens_per_s": {"with": 350.0, "without": 352.0},
        "cpu_ms_per_token": {"with": 5.5, "without": 5.6},
        "wall_ratio": (1.0, 0.9, 1.1),
        "cpu_ratio": (1.0, 0.98, 1.02),
        "turn_ns": 250.0,
    },
    "beside": {
        "alone": {"p50_ms": 80.0, "p99_ms": 90.0},
        "beside": {"p50_ms": 120.0, "p99_ms": 160.0},
        "texts_per_s": 35.0,
    },
}


def test_texts_are_the_same_on_every_run_and_of_mixed_length() -> None:
    texts = make_texts(200)
    assert texts == make_texts(200)
    lengths = sorted(len(text.split()) for text in texts)
    assert lengths[0] <= 3 and 10 <= lengths[100] <= 30 and lengths[-1] >= 150


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot(RESULTS, tmp_path)
    assert "sentence-transformers, alone: 85" in (tmp_path / "throughput.svg").read_text()
    assert "texts embedded all the time: 233" in (tmp_path / "impact.svg").read_text()
    show(RESULTS, "a peer")
    assert "2.23 [2.00, 2.40]" in capsys.readouterr().out
