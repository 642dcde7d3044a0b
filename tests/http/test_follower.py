"""What a host that follows host 0 says of itself over HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from jaxserve.errors import DeviceFailure
from jaxserve.http.follower import Follower
from jaxserve.protocol.status import EngineStatus, Progress
from jaxserve.settings import load_config
from tests.http.test_serve import TIMEOUT_S, children, started

SEVERAL = ("parallel.hosts=2", "parallel.host=1", "parallel.coordinator=127.0.0.1:1")
COMPILING = Progress(phase="compiling", done=3, total=9)


@dataclass
class Client:
    """What a client knows of its engine."""

    status: EngineStatus | None = None
    progress: Progress | None = None
    error: DeviceFailure | None = None


def state(name: str, step_age_s: float = 0.0) -> EngineStatus:
    """An engine's word."""
    return EngineStatus(state=name, pid=7, step_age_s=step_age_s)


def ask(client: Client | None, *requests: tuple[str, str]) -> list[httpx.Response]:
    """What a follower whose engine is like this answers."""
    settings = [*SEVERAL, "engine.step_timeout_s=20"]
    follower = Follower(load_config(settings=settings, environ={}), "no.module")
    follower._client = client  # pyright: ignore[reportAttributeAccessIssue]

    async def answers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(follower)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as asked:
            return [await asked.request(*request) for request in requests]

    return asyncio.run(answers())


@pytest.mark.parametrize(
    ("client", "told"),
    [
        (None, {"status": "restarting"}),
        (Client(), {"status": "starting"}),
        (Client(state("loading")), {"status": "loading"}),
        (
            Client(state("compiling"), COMPILING),
            {"status": "compiling", "progress": {"phase": "compiling", "done": 3, "total": 9}},
        ),
        (Client(state("ready"), COMPILING), {"status": "ready"}),
        (Client(state("ready", 19.0)), {"status": "ready"}),
        (Client(state("ready", 21.5)), {"status": "behind", "behind_s": 21.5}),
        (Client(state("ready"), error=DeviceFailure("it died")), {"status": "restarting"}),
    ],
)
def test_ready_is_to_keep_up_with_host_0(client: Client | None, told: dict[str, Any]) -> None:
    ready, live = ask(client, ("GET", "/ready"), ("GET", "/live"))
    assert ready.status_code == (200 if told["status"] == "ready" else 503)
    assert ready.json() == {"host": 1, **told}
    assert live.status_code == 200


def test_live_is_to_answer() -> None:
    live, health = ask(Client(state("ready", 2.0)), ("GET", "/live"), ("GET", "/health"))
    engine = {"id": 0, "pid": 7, "state": "ready", "step_age_s": 2.0}
    told = {"status": "ok", "host": 1, "engines": [engine]}
    assert live.json() == health.json() == told


def test_nothing_else_is_served() -> None:
    api, post = ask(None, ("GET", "/v1/models"), ("POST", "/ready"))
    assert api.status_code == 404
    assert api.json()["error"]["message"] == "host 1 serves probes only: ask host 0"
    assert (post.status_code, post.headers["allow"]) == (405, "GET, HEAD")


def until(url: str, status: int) -> dict[str, Any]:
    """What it answers once it has this status."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (answer := httpx.get(url, timeout=TIMEOUT_S)).status_code != status:
        assert time.monotonic() < deadline_s, answer.text
    return answer.json()


def test_a_host_is_alive_while_its_engine_is_started_again() -> None:
    settings = ("engine=tests.fakes.following_engine", "engine.restart_backoff_s=0.1")
    with started(*settings, *SEVERAL) as process:
        line = process.stdout.readline()
        assert line.startswith("/live and /ready of host 1 on http://127.0.0.1:")
        base = line.split()[-1]
        assert until(f"{base}/ready", 200) == {"status": "ready", "host": 1}
        (engine,) = children(process.pid)
        assert httpx.get(f"{base}/live", timeout=TIMEOUT_S).json()["engines"][0]["pid"] == engine
        os.kill(engine, signal.SIGKILL)
        assert until(f"{base}/ready", 503)["host"] == 1
        assert httpx.get(f"{base}/live", timeout=TIMEOUT_S).status_code == 200
        until(f"{base}/ready", 200)
        assert children(process.pid) != [engine]
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
