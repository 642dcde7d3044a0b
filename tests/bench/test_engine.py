"""`bench engine` over the fake device: what it counts, and the line it ends in."""

from __future__ import annotations

import json

import pytest

from jaxserve.bench import cli, engine
from jaxserve.bench.engine import Case, EngineBench
from jaxserve.errors import ConfigError
from jaxserve.settings import load_config
from tests.fakes.engine import fake_parts

CONFIG = load_config(
    settings=["scheduler.max_rows=8", "scheduler.max_step_tokens=64", "cache.num_pages=200"],
    environ={},
)


def test_a_decode_case_counts_only_tokens_of_full_steps() -> None:
    bench = EngineBench(CONFIG, fake_parts)
    sample = bench.run(Case(kind="decode", rows=5, context=40), steps=12)
    # Several decode steps may come in one call, so up to a call's worth more than asked for.
    assert 5 * 12 <= sample.tokens < 5 * (12 + CONFIG.scheduler.decode_steps)
    assert sample.tokens % 5 == 0
    assert sample.seconds > 0
    assert sum(sample.step_ms) > 0


def test_the_engine_is_idle_and_empty_between_runs() -> None:
    bench = EngineBench(CONFIG, fake_parts)
    for _ in range(3):
        bench.run(Case(kind="decode", rows=8, context=16), steps=4)
        bench.run(Case(kind="prefill", rows=1, context=100), steps=4)
        assert bench.engine.in_flight is None
        assert bench.engine.scheduler.num_running == 0
        assert bench.engine.scheduler.pages_used == 0


def test_a_prompt_is_computed_again_each_time() -> None:
    bench = EngineBench(CONFIG, fake_parts)
    case, prompts = Case(kind="prefill", rows=1, context=100), [list(range(100))]
    positions = []
    for _ in range(2):
        bench.run(case, 1, prompts)
        positions.append(bench.engine.executor.num_positions)
    assert positions[1] == 2 * positions[0]


def test_a_prefill_case_is_the_time_to_the_first_token() -> None:
    bench = EngineBench(CONFIG, fake_parts)
    sample = bench.run(Case(kind="prefill", rows=1, context=100), steps=1)
    assert sample.tokens == 100
    assert sample.seconds > 0


def test_the_command_ends_in_one_json_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.Roofline, "measure", _measure)
    words = ["engine", "--rows=1,4", "--context=20", "--steps=3", "--prefill=30", "--repeats=2"]
    assert engine.main(cli.parser().parse_args(words), CONFIG, fake_parts) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert [case["name"] for case in record["cases"]] == ["decode 1", "decode 4", "prefill 30"]
    assert all(len(case["tokens_per_s_runs"]) == 2 for case in record["cases"])
    assert record["read_bytes_per_s"] == 1e9
    assert record["config"]["scheduler"]["max_rows"] == 8
    assert record["model"] == "fake"
    assert "decode 4" in captured.err


def test_more_rows_than_the_engine_has_are_refused() -> None:
    arguments = cli.parser().parse_args(["engine", "--rows", "9"])
    with pytest.raises(ConfigError, match=r"scheduler\.max_rows=9"):
        engine.main(arguments, CONFIG, fake_parts)


def test_a_context_that_is_too_short_is_told() -> None:
    config = load_config(settings=["model.max_context=20", "scheduler.max_rows=8"], environ={})
    bench = EngineBench(config, fake_parts)
    with pytest.raises(ConfigError, match="ended before"):
        bench.run(Case(kind="decode", rows=1, context=10), steps=32)


def _measure(roofline: engine.Roofline, *, repeats: int = 3) -> None:
    roofline.bandwidths.append(1e9)
    roofline.peaks.append(1e12)
