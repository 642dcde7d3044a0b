"""Objectives as they are written."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.settings import load_config
from jaxserve.telemetry.slo.indicator import Kind, Labels
from jaxserve.telemetry.slo.objective import parse_objective, parse_objectives


@pytest.mark.parametrize(
    ("text", "name", "kind", "threshold_ns", "target"),
    [
        ("p99 ttft < 100 ms", "p99 ttft < 100 ms", Kind.TTFT, 100_000_000, "0.99"),
        ("  p99.90   ttft<0.1s ", "p99.9 ttft < 100 ms", Kind.TTFT, 100_000_000, "0.999"),
        ("p99 tpot < 20ms", "p99 tpot < 20 ms", Kind.TPOT, 20_000_000, "0.99"),
        ("p95 tpot < 1500 us", "p95 tpot < 1.5 ms", Kind.TPOT, 1_500_000, "0.95"),
        ("p95 e2e < 2 s", "p95 e2e < 2 s", Kind.E2E, 2_000_000_000, "0.95"),
        ("p50 e2e < 2 min", "p50 e2e < 120 s", Kind.E2E, 120_000_000_000, "0.5"),
        ("error_rate < 0.1%", "error_rate < 0.1%", Kind.ERROR_RATE, 0, "0.999"),
        ("availability>99.9 %", "availability > 99.9%", Kind.AVAILABILITY, 0, "0.999"),
    ],
)
def test_an_objective_has_one_name_however_it_is_written(text, name, kind, threshold_ns, target):
    objective = parse_objective(text)
    assert objective.name == name
    assert objective.indicator.kind is kind
    assert objective.indicator.threshold_ns == threshold_ns
    assert objective.target == Decimal(target)
    assert objective.period_s == 28 * 86400
    assert parse_objective(objective.name) == objective


def test_scope_and_period_are_read():
    text = "p99 ttft < 100 ms tenant=b*|acme priority=high model=llama* adapter=x,y period=4w"
    objective = parse_objective(text)
    assert objective.name == (
        "p99 ttft < 100 ms model=llama* tenant=acme|b* adapter=x|y priority=high"
    )
    assert parse_objective(text.replace("4w", "72h")).name.endswith("priority=high period=3d")
    covers = objective.indicator.covers
    fits = {"route": "/v1/completions", "model": "llama-3", "adapter": "x", "priority": -1}
    assert covers(Labels(tenant="acme", **fits))
    assert covers(Labels(tenant="beta", **fits))
    assert not covers(Labels(tenant="acme2", **fits))
    assert not covers(Labels(tenant="acme", **(fits | {"priority": 0})))
    assert not covers(Labels(tenant="acme", **(fits | {"model": "qwen"})))
    assert not covers(Labels(tenant="acme", **(fits | {"adapter": ""})))
    # Turned away before its body was read, so it may have been for any model and adapter.
    assert covers(Labels(tenant="acme", **(fits | {"model": "", "adapter": ""})))


@pytest.mark.parametrize(
    ("written", "inside", "outside"),
    [("high", -1, 0), ("normal", 0, 1), ("low", 1, 0), ("-10", -10, -9), ("3", 3, 2)],
)
def test_priorities_are_classes_or_numbers(written, inside, outside):
    indicator = parse_objective(f"error_rate < 1% priority={written}").indicator
    assert indicator.covers(Labels(route="/v1/completions", model="m", priority=inside))
    assert not indicator.covers(Labels(route="/v1/completions", model="m", priority=outside))


def test_texts_have_no_first_token():
    labels = Labels(route="/v1/embeddings", model="m")
    assert not parse_objective("p99 ttft < 1 s").indicator.covers(labels)
    assert not parse_objective("p99 tpot < 1 s").indicator.covers(labels)
    assert parse_objective("p99 e2e < 1 s").indicator.covers(labels)
    assert parse_objective("availability > 99%").indicator.covers(labels)


def test_objectives_of_one_threshold_share_their_counts():
    p99, p90 = parse_objectives(["p99 ttft < 100 ms", "p90 ttft < 0.1 s period=7d"])
    assert p99.indicator == p90.indicator and p99.name != p90.name
    other = parse_objective("p99 ttft < 101 ms")
    assert other.indicator.key != p99.indicator.key


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("p99 tfft < 100 ms", "'tfft' is not known, the nearest is 'ttft'"),
        ("p99 ttft < 100 mss", "'mss' is not known, the nearest is 'ms'"),
        ("p99 ttft < 100 ms tennant=acme", "'tennant' is not known, the nearest is 'tenant'"),
        ("p99 ttft < 100 ms priority=hihg", "'hihg' is not known, the nearest is 'high'"),
        ("eror_rate < 1%", "'eror_rate' is not known, the nearest is 'error_rate'"),
        ("availabilty > 99.9%", "'availabilty' is not known, the nearest is 'availability'"),
        ("p99 ttft > 100 ms", 'ttft takes "<", not ">"'),
        ("availability < 99.9%", 'availability takes ">", not "<"'),
        ("p99 availability < 1 s", 'availability has no percentile; write "availability > 99.9%"'),
        ("ttft < 5%", 'ttft needs a percentile and a time; write "p99 ttft < 100 ms"'),
        ("p100 ttft < 1 s", "100% leaves no room"),
        ("error_rate < 0%", "0% leaves no room"),
        ("availability > 100%", "100% leaves no room"),
        ("p99 ttft < 0 ms", "no request takes no time"),
        ("p99 ttft < nan ms", "an objective is like"),
        ("p99 ttft < 100", "an objective is like"),
        ("error_rate < 0.001", "an objective is like"),
        ("error_rate < 1% period=1d", "period=1d must be between 3d and 92d"),
        ("error_rate < 1% period=1y", "period=1y is not like 28d"),
        ("error_rate < 1% tenant=", "tenant needs a value"),
        ("error_rate < 1% tenant=a tenant=b", "tenant stands there twice"),
        ("", "an objective is like"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_nearest_word(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_objective(text)
    assert repr(text) in caught.value.message
    assert says in caught.value.message


def test_the_objectives_of_the_documentation_can_be_read(tmp_path: Path):
    text = (Path(__file__).parents[3] / "docs" / "slo.md").read_text()
    (tmp_path / "server.yaml").write_text(text.split("```yaml")[1].split("```")[0])
    written = load_config(tmp_path / "server.yaml", environ={}).slo.objectives
    names = [objective.name for objective in parse_objectives(written)]
    assert names == list(written) and len(names) == 5


def test_an_objective_stands_there_once():
    with pytest.raises(ConfigError, match="twice"):
        parse_objectives(["p99 ttft < 100 ms", "p99.0 ttft < 0.1 s"])
    with pytest.raises(ConfigError, match="at most 64"):
        parse_objectives([f"p99 ttft < {n} ms" for n in range(1, 66)])
