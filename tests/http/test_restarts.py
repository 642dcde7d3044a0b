"""When an engine of several hosts is started again, and after what pause."""

from __future__ import annotations

import signal
import socket

import pytest

from jaxserve.http import restarts
from jaxserve.http.restarts import Backoff, may_restart
from tests.http.test_serve import TIMEOUT_S, started

SEVERAL = ("parallel.hosts=2", "parallel.host=1")


@pytest.mark.parametrize(
    ("status", "again"), [(0, False), (1, False), (3, True), (4, True), (-9, True), (-6, True)]
)
def test_who_has_told_why_is_not_started_again(status: int, again: bool) -> None:
    assert may_restart(status) is again


def test_pauses_grow_while_lives_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now_s)
    backoff = Backoff(1.0)
    pauses = []
    for lived_s in (5, 5, 5, 5, 5, 5, 5, 5, 500, 5):
        backoff.started()
        now_s += lived_s
        pauses.append(backoff.next_pause_s())
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30, 0, 1]


def test_another_host_whose_engine_tells_why_it_cannot_start_ends() -> None:
    settings = ("engine=tests.fakes.failing_engine", "model.path=/no/such/model")
    with started(*settings, *SEVERAL, "parallel.coordinator=127.0.0.1:1") as process:
        assert process.wait(TIMEOUT_S) == 1
        lines = [line for line in process.stderr.read().splitlines() if line.startswith("jaxserve")]
        assert lines == ["jaxserve: /no/such/model does not exist"]


def test_another_host_tries_until_it_is_told_to_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = (f"parallel.coordinator=127.0.0.1:{port}", "parallel.connect_timeout_s=1")
    with started("engine=jaxserve.engine.process", *settings, *SEVERAL) as process:
        for _ in range(2):
            lines = (line for line in process.stderr or () if line.startswith("jaxserve: "))
            assert next(lines) == (
                f"jaxserve: host 0 was not met at 127.0.0.1:{port} within "
                "parallel.connect_timeout_s=1: Connection refused\n"
            )
            assert next(lines) == (
                "jaxserve: the engine process ended with status 4; it is started again\n"
            )
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


def test_a_host_refused_for_its_settings_ends_and_host_0_waits_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = ("engine=jaxserve.engine.process", "parallel.hosts=2", "parallel.connect_timeout_s=60")
    common = (*common, f"parallel.coordinator=127.0.0.1:{port}")
    with (
        started(*common) as first,
        started(*common, "parallel.host=1", "cache.page_size=8") as second,
    ):
        assert second.wait(TIMEOUT_S) == 1
        assert (
            "jaxserve: host 0 refuses host 1: it is configured differently: "
            "cache.page_size is 8 there and 16 here\n"
        ) in second.stderr.read()
        assert first.poll() is None
        first.send_signal(signal.SIGTERM)
        assert first.wait(TIMEOUT_S) == 0
