"""What is counted from the engine's statistics and status."""

from __future__ import annotations

import typing

from jaxserve.http.metrics import Metrics
from jaxserve.protocol.messages import EngineStatus, StepStats


def step_stats(**fields) -> StepStats:
    """One device call; zeros where nothing is said."""
    hints = typing.get_type_hints(StepStats)
    return StepStats(**{name: "" if kind is str else 0 for name, kind in hints.items()} | fields)


def test_hits_and_kept_pages_are_told():
    status = EngineStatus(state="ready", pid=1, step_age_s=0.0, pages_cached=7, pages_total=9)
    metrics = Metrics(lambda: status)
    metrics.step(step_stats(prefix_lookup_tokens=100, prefix_hit_tokens=64))
    metrics.step(step_stats(prefix_lookup_tokens=20))
    lines = metrics.render().decode().splitlines()
    assert "jaxserve_prefix_lookup_tokens_total 120.0" in lines
    assert "jaxserve_prefix_hit_tokens_total 64.0" in lines
    assert "jaxserve_pages_cached 7.0" in lines


def test_shed_sequences_are_told_by_reason():
    status = EngineStatus(state="ready", pid=1, step_age_s=0, shed={"priority": 3, "queue_full": 7})
    text = Metrics(lambda: status).render().decode()
    assert 'jaxserve_shed_total{reason="priority"} 3.0' in text
    assert 'jaxserve_shed_total{reason="queue_full"} 7.0' in text
