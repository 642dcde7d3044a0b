"""From an alert to those who are told: outages, restarts, a full disk, a death while sending."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.config import AlertsConfig
from jaxserve.telemetry.alerts import courier as courier_module
from jaxserve.telemetry.alerts.incident import Severity
from jaxserve.telemetry.alerts.notifier import FILE, Notifier
from jaxserve.telemetry.alerts.receivers import make_receivers
from tests.fakes.alert_receiver import AlertReceiver
from tests.fakes.clock import Clock


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(courier_module, "LONGEST_PAUSE_S", 0.05)


def make(state: Path, *receivers: AlertReceiver, slack: bool = False, **settings) -> Notifier:
    """A notifier whose receivers are these, as webhooks."""
    urls = tuple(f"{receiver.url}/hook" for receiver in receivers)
    config = AlertsConfig(slack=urls) if slack else AlertsConfig(webhooks=urls)
    return Notifier(make_receivers(config, "host:1"), state, **{"hold_s": 0.0} | settings)


async def until(notifier: Notifier, condition: Callable[[], bool]) -> None:
    """Ticks until something is so."""
    async with asyncio.timeout(20):
        while not condition():
            await notifier.tick()
            await asyncio.sleep(0.005)


def fire(notifier: Notifier, firing: bool = True, key: str = "slo") -> None:
    notifier.book.on_alert(key, firing, Severity.ERROR, "too slow", {"p99": "1 s"})


def test_after_an_outage_each_notice_comes_once(tmp_path: Path):
    async def work() -> None:
        with AlertReceiver() as here, AlertReceiver() as away:
            notifier = make(tmp_path, here, away)
            away.stop()
            fire(notifier, key="a")
            fire(notifier, key="b")
            await until(notifier, lambda: len(here.bodies) == 2)
            fire(notifier, False, key="a")
            await until(notifier, lambda: len(here.bodies) == 3)
            await until(notifier, lambda: notifier.couriers[1].num_failed >= 5)
            away.start()
            away.statuses = [503, 500, 429]  # it comes back slowly
            await until(notifier, lambda: away.num_refused >= 2)
            away.statuses = []
            await until(notifier, lambda: not notifier.couriers[1].queue)
            for _ in range(20):
                await notifier.tick()
            await notifier.close()
            assert [(b["key"].rpartition("/")[2], b["status"]) for b in away.bodies] == [
                ("a", "firing"),
                ("b", "firing"),
                ("a", "resolved"),
            ]
            assert [b["id"] for b in away.bodies] == [b["id"] for b in here.bodies]

    asyncio.run(work())


def test_a_receiver_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def work() -> None:
        with AlertReceiver() as here:
            notifier = make(tmp_path, here, here)
            go_on = asyncio.Event()
            loop = asyncio.get_running_loop()

            def hang(_) -> None:
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()

            monkeypatch.setattr(notifier.couriers[0].receiver, "send", hang)
            fire(notifier)
            await until(notifier, lambda: len(here.bodies) == 1)
            async with asyncio.timeout(1):
                for _ in range(10):
                    await notifier.tick()
            go_on.set()
            await notifier.close()

    asyncio.run(work())


def test_what_was_not_delivered_is_after_a_restart_and_what_was_is_not_again(tmp_path: Path):
    async def work() -> None:
        with AlertReceiver() as here, AlertReceiver() as away:
            away.stop()
            first = make(tmp_path, here, away)
            fire(first)
            await until(first, lambda: len(here.bodies) == 1 and first.couriers[1].num_failed > 0)
            await first.close()
            away.start()
            second = make(tmp_path, here, away)
            assert [incident.key for incident in second.book.open] == ["slo"]
            fire(second)  # it still is so
            await until(second, lambda: len(away.bodies) == 1)
            for _ in range(10):
                await second.tick()
            await second.close()
            assert len(here.bodies) == len(away.bodies) == 1
            assert here.bodies == away.bodies

    asyncio.run(work())


def test_queues_follow_their_receiver_and_not_its_place(tmp_path: Path):
    async def work() -> None:
        with AlertReceiver() as one, AlertReceiver() as other:
            one.stop()
            first = make(tmp_path, one, other)
            fire(first)
            await until(first, lambda: len(other.bodies) == 1)
            await first.close()
            one.start()
            second = make(tmp_path, other, one)
            await until(second, lambda: len(one.bodies) == 1)
            await second.close()
            assert len(other.bodies) == 1

    asyncio.run(work())


def test_a_notice_is_on_the_disk_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def work() -> None:
        with AlertReceiver() as here:
            notifier = make(tmp_path, here)
            seen = []

            def look(notice) -> None:
                saved = json.loads((tmp_path / FILE).read_text())
                seen.append([n["id"] for queue in saved["queues"].values() for n in queue])
                assert notice.id in seen[-1]

            monkeypatch.setattr(notifier.couriers[0].receiver, "send", look)
            fire(notifier)
            await until(notifier, lambda: bool(seen))
            await notifier.close()
            saved = json.loads((tmp_path / FILE).read_text())
            assert list(saved["queues"].values()) == [[]]  # and no longer there once it was taken

    asyncio.run(work())


def test_a_full_disk_keeps_nobody_from_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def work() -> None:
        clock = Clock()
        with AlertReceiver() as here:
            notifier = make(tmp_path, here, monotonic=clock)
            monkeypatch.setattr(os, "fsync", full)
            fire(notifier)
            await until(notifier, lambda: len(here.bodies) == 1)
            assert notifier.num_unsaved == 1
            clock.advance(1000)
            await notifier.save()
            assert notifier.num_unsaved == 2
            monkeypatch.undo()
            clock.advance(1000)
            await notifier.save()
            await notifier.close()
        assert json.loads((tmp_path / FILE).read_text())["open"][0]["key"] == "slo"

    asyncio.run(work())
    assert caplog.text.count("alerts cannot be kept on the disk") == 1


@pytest.mark.parametrize("content", ["{", '{"version": 9}', '{"version": 1, "open": 3}'])
def test_a_broken_file_is_set_aside(tmp_path: Path, content: str):
    (tmp_path / FILE).write_text(content)
    with AlertReceiver() as here:
        notifier = make(tmp_path, here)
    assert notifier.book.open == []
    assert (tmp_path / "alerts.broken").read_text() == content


_KILLED = """
import asyncio, sys
from pathlib import Path
from jaxserve.config import AlertsConfig
from jaxserve.telemetry.alerts.incident import Severity
from jaxserve.telemetry.alerts.notifier import Notifier
from jaxserve.telemetry.alerts.receivers import make_receivers

async def work():
    receivers = make_receivers(AlertsConfig(webhooks=(sys.argv[1],)), "host:1")
    notifier = Notifier(receivers, Path(sys.argv[2]), hold_s=60.0)
    while True:
        notifier.book.on_alert("slo", True, Severity.ERROR, "too slow", {})
        await notifier.tick()
        await asyncio.sleep(0.01)

asyncio.run(work())
"""


def test_killed_between_send_and_answer_it_is_told_again_with_the_same_key(tmp_path: Path):
    with AlertReceiver() as here:
        arguments = [sys.executable, "-c", _KILLED, f"{here.url}/hook", str(tmp_path)]
        again = threading.Event()

        def kill() -> None:
            if len(here.bodies) == 1:
                first.send_signal(signal.SIGKILL)  # it has the alert, and will not hear so
                first.wait()
            else:
                again.set()

        here.before_answer = kill
        first = subprocess.Popen(arguments)
        assert first.wait(timeout=30) == -signal.SIGKILL
        second = subprocess.Popen(arguments)
        try:
            assert again.wait(timeout=30)
        finally:
            second.terminate()
            second.wait()
        assert here.bodies[0] == here.bodies[1]  # the same key, the same id
