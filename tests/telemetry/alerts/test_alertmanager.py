"""Alerts in a real Alertmanager, asked by its API."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import AlertsConfig
from jaxserve.telemetry.alerts import courier as courier_module
from jaxserve.telemetry.alerts import receivers as receivers_module
from jaxserve.telemetry.alerts.incident import Severity
from jaxserve.telemetry.alerts.notifier import Notifier
from jaxserve.telemetry.alerts.receivers import ALERTMANAGER_BELIEVES_S, make_receivers

PROGRAM = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Alertmanager here")

CONFIG = """
route: {receiver: none, group_by: [key]}
receivers: [{name: none}]
"""


class Alertmanager:
    """The real one, on a port of loopback."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        (directory / "am.yml").write_text(CONFIG)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        assert PROGRAM is not None
        self._process = subprocess.Popen(
            [
                PROGRAM,
                f"--config.file={self._directory / 'am.yml'}",
                f"--storage.path={self._directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
                "--cluster.listen-address=",
            ],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                self.get("/-/ready")
                return
            except OSError:
                assert time.monotonic() < deadline and self._process.poll() is None
                time.sleep(0.05)

    def stop(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=30)
            self._process = None

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return answer.read()

    def alerts(self) -> list[dict[str, Any]]:
        """Those that are active."""
        return json.loads(self.get("/api/v2/alerts?active=true"))


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[Alertmanager]:
    made = Alertmanager(tmp_path)
    made.start()
    yield made
    made.stop()


def make(alertmanager: Alertmanager, state: Path) -> Notifier:
    state.mkdir(exist_ok=True)
    config = AlertsConfig(alertmanagers=(alertmanager.url,))
    return Notifier(make_receivers(config, "host:1"), state, hold_s=0.0)


async def until(notifier: Notifier, condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await notifier.tick()
            await asyncio.sleep(0.02)


def fire(notifier: Notifier, firing: bool = True) -> None:
    notifier.book.on_alert("slo:ttft", firing, Severity.CRITICAL, "too slow", {"p99": "1 s"})


def test_it_is_active_until_it_is_over(alertmanager: Alertmanager, tmp_path: Path):
    async def work() -> None:
        notifier = make(alertmanager, tmp_path / "state")
        fire(notifier)
        await until(notifier, lambda: len(alertmanager.alerts()) == 1)
        (alert,) = alertmanager.alerts()
        assert alert["labels"]["alertname"] == "jaxserve slo"
        assert alert["labels"]["severity"] == "critical"
        assert alert["annotations"] == {"summary": "too slow", "description": "p99: 1 s"}
        ends_s = datetime.fromisoformat(alert["endsAt"]).timestamp()
        assert ends_s - datetime.now(UTC).timestamp() == pytest.approx(
            ALERTMANAGER_BELIEVES_S, abs=30
        )
        fire(notifier, False)
        await until(notifier, lambda: not alertmanager.alerts())
        await notifier.close()

    asyncio.run(work())


def test_it_is_told_again_before_it_forgets(
    alertmanager: Alertmanager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(receivers_module.Alertmanager, "resend_s", 0.2)
    monkeypatch.setattr(receivers_module, "ALERTMANAGER_BELIEVES_S", 2.0)

    async def work() -> None:
        notifier = make(alertmanager, tmp_path / "state")
        fire(notifier)
        await until(notifier, lambda: len(alertmanager.alerts()) == 1)
        first = alertmanager.alerts()[0]["endsAt"]
        await until(notifier, lambda: alertmanager.alerts()[0]["endsAt"] > first)
        await notifier.close()
        # Nobody speaks of it any more: a server that has died leaves no alert for ever.
        async with asyncio.timeout(30):
            while alertmanager.alerts():
                await asyncio.sleep(0.1)

    asyncio.run(work())


def test_one_that_was_away_knows_once_it_is_back(
    alertmanager: Alertmanager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(courier_module, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(courier_module, "LONGEST_PAUSE_S", 0.2)

    async def work() -> None:
        alertmanager.stop()
        notifier = make(alertmanager, tmp_path / "state")
        fire(notifier)
        await until(notifier, lambda: notifier.couriers[0].num_failed >= 2)
        alertmanager.start()
        await until(notifier, lambda: len(alertmanager.alerts()) == 1)
        await notifier.close()
        assert notifier.couriers[0].num_sent == 1

    asyncio.run(work())
