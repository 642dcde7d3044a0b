"""A server's own alerts: from processes that die to who is told, and /v1/alerts."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from tests.fakes.alert_receiver import AlertReceiver
from tests.http.test_serve import TIMEOUT_S, address_of, children, command, started

SECRET = "sEcReT12345"


@pytest.mark.slow
def test_an_engine_that_dies_again_and_again_is_told_once_and_shown(tmp_path):
    with (
        AlertReceiver() as at,
        started(
            f"alerts.webhooks={at.url}/{SECRET}",
            "alerts.source=here",
            "engine.restart_backoff_s=0",
            "telemetry.report_interval_s=0.01",
            f"telemetry.state_dir={tmp_path}",
        ) as process,
    ):
        base = address_of(process)
        with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
            assert client.get("/v1/alerts").json()["open"] == []
            assert client.get("/v1/baselines").json()["changes"] == []
            deadline = time.monotonic() + TIMEOUT_S
            killed: set[int] = set()
            while len(killed) < 3:
                assert time.monotonic() < deadline
                engines = [p for p in children(process.pid) if "fakes.engine" in command(p)]
                if engines and engines[0] not in killed and ready(client):
                    os.kill(engines[0], signal.SIGKILL)
                    killed.add(engines[0])
                time.sleep(0.01)
            while not at.bodies:
                assert time.monotonic() < deadline, "nobody was told"
                time.sleep(0.01)
            document = client.get("/v1/alerts").json()
            while not document["receivers"][0]["sent"]:  # counted once the answer has come
                assert time.monotonic() < deadline
                time.sleep(0.01)
                document = client.get("/v1/alerts").json()
            assert [incident["key"] for incident in document["open"]] == ["engine"]
            assert document["receivers"][0]["sent"] == 1
            assert "jaxserve_alerts_open" in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        log = process.stderr.read()
    assert [body["key"] for body in at.bodies] == ["jaxserve/here/engine"]
    assert SECRET not in log
    assert (tmp_path / "alerts.json").exists() and (tmp_path / "baselines.json").exists()


def ready(client: httpx.Client) -> bool:
    return client.get("/ready").status_code == 200
