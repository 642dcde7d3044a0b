"""What /metrics says of the engine."""

from __future__ import annotations

from jaxserve.http.metrics import Metrics
from jaxserve.protocol.messages import EngineStatus


def test_shed_sequences_are_told_by_reason():
    status = EngineStatus(state="ready", pid=1, step_age_s=0, shed={"priority": 3, "queue_full": 7})
    text = Metrics(lambda: status).render().decode()
    assert 'jaxserve_shed_total{reason="priority"} 3.0' in text
    assert 'jaxserve_shed_total{reason="queue_full"} 7.0' in text
