"""/slo of a real server: what its requests count as, and what is left of that after an end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.http.observer.reporter import NoReporter
from jaxserve.protocol.records import Begun, Outcome, RequestRecord
from tests.http.frontend import Front
from tests.http.test_serve import ENDLESS, HI, TIMEOUT_S, address_of, children, command, started

OBJECTIVES = "p99 ttft < 60 s,p99 tpot < 60 s,p99 e2e < 1 us,availability > 99.9%"
TTFT, TPOT, E2E, AVAILABLE = range(4)


def objectives_of(base: str) -> list[dict[str, Any]]:
    return httpx.get(f"{base}/slo", timeout=TIMEOUT_S).raise_for_status().json()["objectives"]


def counts_of(objectives: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Good and bad of each; what had no TPOT, since its tokens came at once, counts as good."""
    return [(o["good"] + o["not_counted"]["unmeasured"], o["bad"]) for o in objectives]


def until(base: str, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """Asks until it is so."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if condition(found := objectives_of(base)):
                return found
        except httpx.HTTPStatusError as error:  # an observer that is being started again
            if error.response.status_code != 503:
                raise
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def chat(base: str, **values) -> httpx.Response:
    body = {"messages": HI, "max_tokens": 3, "ignore_eos": True} | values
    return httpx.post(f"{base}/v1/chat/completions", json=body, timeout=TIMEOUT_S)


def observer_of(pid: int) -> int:
    return next(p for p in children(pid) if "http.observer" in command(p))


@pytest.mark.slow
def test_requests_are_counted_through_the_ends_of_observer_and_server(tmp_path: Path):
    settings = (f"slo.objectives={OBJECTIVES}", f"telemetry.state_dir={tmp_path}")
    with started(*settings, "http.workers=2", "model.max_context=3000") as process:
        base = address_of(process)
        for _ in range(6):
            assert chat(base).status_code == 200
        assert chat(base, max_tokens=1).status_code == 200  # no TPOT
        assert chat(base, temperature="hot").status_code == 400
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=ENDLESS) as response:
            next(response.iter_lines())  # and its client leaves
        # Two workers tell of them, neither waiting for the other.
        until(base, lambda o: o[AVAILABLE]["not_counted"]["cancelled"] == 1)
        until(base, lambda o: o[AVAILABLE]["not_counted"]["refused"] == 1)
        found = until(base, lambda o: sum(counts_of(o)[AVAILABLE]) == 7)
        assert counts_of(found) == [(7, 0), (7, 0), (0, 8), (7, 0)]
        assert found[TPOT]["not_counted"]["unmeasured"] >= 1
        assert found[E2E]["bad_by_cause"]["late"] == 8
        assert found[AVAILABLE]["compliance_percent"] == 100

        text = httpx.get(f"{base}/slo?format=text").text
        assert text.splitlines()[0].startswith("objective")
        assert "availability > 99.9%" in text and "100.000%" in text
        metrics = httpx.get(f"{base}/metrics").text
        name = 'jaxserve_slo_events_total{objective="availability > 99.9%",verdict='
        assert f'{name}"good"}} 7.0' in metrics and f'{name}"refused"}} 1.0' in metrics

        os.kill(observer_of(process.pid), signal.SIGKILL)
        assert chat(base).status_code == 200  # serving does not notice
        found = until(base, lambda o: o[AVAILABLE]["good"] == 8)
        assert found[AVAILABLE]["not_counted"]["cancelled"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    with started(*settings) as process:
        base = address_of(process)
        found = objectives_of(base)
        assert counts_of(found) == [(8, 0), (8, 0), (0, 9), (8, 0)]


@pytest.mark.slow
def test_an_engine_that_hangs_is_seen_while_it_does(tmp_path: Path):
    with started("slo.objectives=availability > 99.9%", "slo.overdue_s=0.5") as process:
        base = address_of(process)
        assert chat(base).status_code == 200
        engine = next(p for p in children(process.pid) if "fakes.engine" in command(p))
        os.kill(engine, signal.SIGSTOP)
        statuses: list[int] = []
        client = threading.Thread(target=lambda: statuses.append(chat(base).status_code))
        client.start()
        try:
            found = until(base, lambda o: o[0]["bad_by_cause"]["overdue"] == 1)
            assert (found[0]["good"], found[0]["bad"]) == (1, 1)
        finally:
            os.kill(engine, signal.SIGCONT)
            client.join(TIMEOUT_S)
        assert statuses == [200]
        found = until(base, lambda o: o[0]["good"] == 2)
        assert found[0]["bad"] == 0


def test_begin_first_token_and_end_of_a_request_are_told_in_turn(front: Front):
    class Heard(NoReporter):
        def __init__(self) -> None:
            self.seen: list[tuple[str, Any]] = []

        def begun(self, begun: Begun) -> None:
            self.seen.append(("begun", begun))

        def first_token(self, record: RequestRecord) -> None:
            self.seen.append(("first token", record.first_token_ns))

        def ended(self, record: RequestRecord) -> None:
            self.seen.append(("ended", record))

    heard = front.app.frontend.reporter = Heard()
    body = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True, "n": 3, "priority": "high"}
    front.ok("/v1/completions", body)
    (_, begun), (_, first_ns), (_, record) = heard.seen  # one first token, of three choices
    assert [name for name, _ in heard.seen] == ["begun", "first token", "ended"]
    assert begun.request_id == record.request_id
    assert (begun.model, begun.priority, begun.adapter) == ("fake", -10, "")
    assert record.arrived_ns < first_ns == record.first_token_ns < record.done_ns
    assert record.outcome is Outcome.DONE


def test_an_objective_that_cannot_be_read_ends_the_start(tmp_path: Path):
    with started("slo.objectives=p99 tfft < 1 s") as process:
        _, error = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode in (1, 2)
        assert "'tfft' is not known, the nearest is 'ttft'" in error
        assert "Traceback" not in error
