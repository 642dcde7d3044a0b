"""Deadlines and load over HTTP: what is refused before any work, cut short, or given up midway."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import ANY

import httpx
import pytest

from jaxserve.config import CacheConfig, Config, LimitsConfig, ModelConfig, SchedulerConfig
from jaxserve.http import gate
from jaxserve.http.auth import Identity, KeyRing
from jaxserve.http.metrics import Metrics
from jaxserve.protocol.status import ClassLoad, EngineStatus
from jaxserve.types import SamplingParams
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import TIMEOUT_S, Front
from tests.http.frontend import front as make_front

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
LONG = Config(
    model=ModelConfig(max_context=60_000, served_name="fake"),
    cache=CacheConfig(page_size=16, num_pages=8000),
    scheduler=SchedulerConfig(max_rows=4, max_step_tokens=64, decode_steps=1),
)
ENDLESS = {"messages": HI, "max_tokens": 50_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def long() -> Iterator[Front]:
    """An engine that one request keeps busy for a long time."""
    with make_front(config=LONG) as made:
        yield made


def wait_idle(front: Front) -> None:
    """Waits until the engine runs nothing."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (status := front.run(front.client.get_status())).running or status.waiting:
        assert time.monotonic() < deadline_s, "it was not cancelled"
    assert status.pages_used == 0


def test_a_deadline_ends_a_request_and_frees_the_engine(long: Front):
    started_s = time.monotonic()
    response = long.post(CHAT, ENDLESS | {"timeout": 0.3})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert time.monotonic() - started_s >= 0.3
    wait_idle(long)
    response = long.post(CHAT, ENDLESS, headers={"x-request-deadline": "300m"})
    assert response.status_code == 504
    wait_idle(long)


def test_a_stream_that_has_begun_ends_with_the_error(long: Front):
    at = f"{time.time() + 2:.3f}"  # time enough on a busy machine to be let in and begin
    response = long.post(CHAT, ENDLESS | {"stream": True}, headers={"x-request-deadline": at})
    assert response.status_code == 200, response.text
    events = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert len(events) > 2
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"
    wait_idle(long)


def test_a_response_has_deadlines_too():
    body = {"input": "hi", "max_output_tokens": 50_000, "ignore_eos": True, "timeout": 0.5}
    with make_front(config=LONG) as made:
        streamed = made.post("/v1/responses", body | {"stream": True})
        assert streamed.status_code == 200
        *_, last = streamed.text.strip().split("\n\n")
        assert last.startswith("event: response.failed\n")
        error = json.loads(last.partition("data: ")[2])["response"]["error"]
        assert error["code"] == "server_error" and "deadline" in error["message"]
        wait_idle(made)


def test_the_default_deadline_is_for_those_that_name_none():
    with make_front(config=LONG, limits=LimitsConfig(default_timeout_s=0.3)) as made:
        assert made.post(CHAT, ENDLESS).status_code == 504
        short = {"messages": HI, "max_tokens": 3, "timeout": 60}
        assert made.post(CHAT, short).status_code == 200
        wait_idle(made)


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"timeout": 0}, {}, "timeout"),
        ({"timeout": -1}, {}, "timeout"),
        ({"timeout": "5"}, {}, "timeout"),
        ({"timeout": 1e12}, {}, "timeout"),
        ({}, {"x-request-deadline": "tomorrow"}, "x-request-deadline"),
    ],
)
def test_wrong_deadlines_are_named(long: Front, body, headers, param):
    response = long.post(CHAT, {"messages": HI, "max_tokens": 2} | body, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_deadline_that_has_passed_is_a_504_at_once(long: Front):
    headers = {"x-request-deadline": str(int(time.time()) - 5)}
    response = long.post(CHAT, ENDLESS, headers=headers)
    assert response.status_code == 504
    assert "retry-after" in response.headers


# ---------------------------------------------------------------------------- load


def busy(waiting: int = 490) -> EngineStatus:
    """An engine with a wait of 100 s for normal and low priorities."""
    return EngineStatus(
        state="ready",
        pid=1,
        step_age_s=0,
        at_ns=time.monotonic_ns(),
        max_rows=10,
        service_s=2.0,
        token_s=0.02,
        output_share=1.0,
        loads=[ClassLoad(priority=0, tenant="", running=10, waiting=waiting)],
        pages_total=100,
    )


@contextmanager
def loaded(**limits: Any) -> Iterator[Front]:
    """A front whose engine says that it is busy."""
    ring = KeyRing([(bytes(32), Identity())])
    identity = Identity(priority=0, priority_ceiling=0)
    ring.identify = lambda authorization: identity
    with make_front(keys=ring, limits=LimitsConfig(**limits)) as made:
        made.app.frontend.gate.admission._status = busy
        yield made


def call(front: Front, headers: dict[str, str], body: dict) -> tuple[int, dict, int, float]:
    """One request straight to the application: status, head, messages read, seconds."""
    data = json.dumps(body).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": [
            (b"content-type", b"application/json"),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ],
    }
    sent, reads = [], 0

    async def receive() -> dict:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": data}

    async def send(message: dict) -> None:
        sent.append(message)

    async def run() -> float:
        started_s = time.perf_counter()
        await front.app(scope, receive, send)
        return time.perf_counter() - started_s

    seconds = front.run(run())
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, reads, seconds


def refuse_to_tokenize(monkeypatch) -> None:
    """Fails the test if anything is tokenized."""

    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(ByteTokenizer, "encode", encode)


def num_shed(metrics: Metrics, reason: str) -> float:
    """Requests that were refused for it so far."""
    start = f'jaxserve_shed_total{{reason="{reason}"}} '
    lines = metrics.render().decode().splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


def test_a_refusal_comes_before_any_work_within_5_ms(monkeypatch):
    body = {"messages": [{"role": "user", "content": "x" * 60_000}], "max_tokens": 5}
    with loaded(max_wait_s=30) as made:
        refuse_to_tokenize(monkeypatch)
        best_s = 1.0
        for _ in range(30):
            status, head, reads, seconds = call(made, {}, body)
            assert (status, reads) == (503, 0)  # the body was not even read
            assert 60 >= int(head["retry-after"]) >= 1
            best_s = min(best_s, seconds)
        assert best_s < 0.005
    monkeypatch.undo()
    with loaded() as made:
        refuse_to_tokenize(monkeypatch)
        best_s = 1.0
        for _ in range(30):
            status, _, reads, seconds = call(made, {}, body | {"timeout": 5})
            assert (status, reads) == (503, 1)
            best_s = min(best_s, seconds)
        assert best_s < 0.005
        metrics = made.app.frontend.metrics.render().decode()
        assert 'jaxserve_shed_total{reason="deadline"} 30.0' in metrics


def test_a_deadline_that_passes_while_the_prompt_is_tokenized_is_counted(long: Front, monkeypatch):
    def encode(*_: Any, **__: Any) -> list[int]:
        until_s = time.monotonic() + 0.06
        while time.monotonic() < until_s:
            pass
        return [300]

    metrics = long.app.frontend.metrics
    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    before = num_shed(metrics, "deadline")
    response = long.post(CHAT, {"messages": HI, "timeout": 0.05})
    assert response.status_code == 504
    assert num_shed(metrics, "deadline") == before + 1


def test_a_refusal_says_why_and_high_priority_goes_on():
    with loaded(max_wait_s=30) as made:
        refused = made.post(CHAT, {"messages": HI, "max_tokens": 2})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "overloaded")
        assert "98.2 s" in error["message"] and "30 s" in error["message"]
        assert int(refused.headers["retry-after-ms"]) == pytest.approx(60_000, abs=1)
        made.app.frontend.keys.identify = lambda _: Identity(priority_ceiling=-10)
        assert made.post(CHAT, {"messages": HI, "max_tokens": 2}).status_code == 503
        high = {"messages": HI, "max_tokens": 2, "priority": -10}
        assert made.post(CHAT, high).status_code == 200


def test_low_priority_is_capped_under_overload_and_told_so():
    with loaded(overload_wait_s=5, overload_after_s=3600, low_priority_max_tokens=3) as made:
        made.app.frontend.gate.admission._degradation.level = 1
        body = {"prompt": [300], "max_tokens": 9, "ignore_eos": True, "priority": 1}
        capped = made.post(COMPLETIONS, body)
        assert capped.json()["usage"]["completion_tokens"] == 3
        assert capped.json()["choices"][0]["finish_reason"] == "length"
        assert capped.headers["x-jaxserve-max-tokens"] == "3"
        wanted = made.post(COMPLETIONS, body | {"min_tokens": 5})
        assert wanted.json()["usage"]["completion_tokens"] == 5
        normal = made.post(COMPLETIONS, body | {"priority": 0})
        assert normal.json()["usage"]["completion_tokens"] == 9
        assert "x-jaxserve-max-tokens" not in normal.headers
        metrics = made.app.frontend.metrics.render().decode()
        assert 'jaxserve_shed_total{reason="capped"} 2.0' in metrics
        assert "jaxserve_overload_level 1.0" in metrics
        assert "jaxserve_estimated_wait_seconds 98" in metrics
        made.app.frontend.gate.admission._degradation.level = 2
        refused = made.post(COMPLETIONS, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert "low priority" in refused.json()["error"]["message"]


def test_the_engine_tells_its_load(long: Front):
    sampling = SamplingParams(max_tokens=50_000, ignore_eos=True, seed=1)

    async def run() -> EngineStatus:
        submit = long.client.submit
        streams = [
            submit([300] * 7, sampling, priority=p, tenant=t, weight=w)
            for p, t, w in [(0, "a", 2.0)] * 4 + [(7, "b", 0.5)] * 2
        ]
        while True:
            status = await long.client.get_status()
            if status.running == 4 and status.waiting == 2:
                break
        for stream in streams:
            stream.cancel()
        return status

    status = long.run(run())
    assert status.max_rows == 4 and abs(time.monotonic_ns() - status.at_ns) < 60e9
    assert sorted(status.loads, key=lambda load: load.priority) == [
        ClassLoad(priority=0, tenant="a", weight=2.0, running=4, waiting=0, tokens=ANY),
        ClassLoad(priority=7, tenant="b", weight=0.5, running=0, waiting=2, tokens=14),
    ]
    wait_idle(long)
    after = long.run(long.client.get_status())
    assert after.loads == []
    assert after.service_s > 0 and after.token_s > 0 and after.prefill_tokens_per_s > 0


# ---------------------------------------------------------------------------- every shed is counted


def test_refusals_of_a_server_that_drains_or_is_not_ready_are_counted():
    body = {"prompt": [300], "max_tokens": 2}
    with make_front() as made:
        metrics = made.app.frontend.metrics
        status = made.client._dispatcher.status
        assert status is not None
        made.client._dispatcher.status = dataclasses.replace(status, state="compiling")
        refused = made.post(COMPLETIONS, body)
        assert (refused.status_code, "compiling" in refused.text) == (503, True)
        assert num_shed(metrics, "not_ready") == 1
        made.client._dispatcher.status = status
        made.app.frontend.draining = True
        for path in (COMPLETIONS, "/tokenize"):
            assert made.post(path, body).status_code == 503
        assert (num_shed(metrics, "draining"), num_shed(metrics, "not_ready")) == (2, 1)


def test_what_a_full_queue_refuses_is_told_times_of_its_own():
    config = dataclasses.replace(
        LONG, scheduler=SchedulerConfig(max_rows=1, max_waiting=0, decode_steps=1)
    )
    with make_front(config=config) as made:

        async def crowd() -> list[httpx.Response]:
            first = asyncio.create_task(made.http.post(CHAT, json=ENDLESS))
            while not (await made.client.get_status()).running:
                await asyncio.sleep(0)
            refused = [await made.http.post(CHAT, json=ENDLESS) for _ in range(4)]
            first.cancel()
            return refused

        refused = made.run(crowd())
        assert [response.status_code for response in refused] == [503] * 4
        told = [int(response.headers["retry-after-ms"]) / 1000 for response in refused]
        assert told == pytest.approx([1, 2, 3, 4], abs=0.9)
        assert told == sorted(set(told))
        wait_idle(made)


def test_who_comes_after_others_have_ended_is_not_refused_for_them():
    """Though the engine's last status is from before they came."""
    body = {"prompt": [300], "max_tokens": 2}
    with make_front() as made:
        made.post(COMPLETIONS, body)
        status = made.run(made.client.get_status())
        old = dataclasses.replace(status, at_ns=1, service_s=100.0, token_s=50.0, max_rows=2)
        made.app.frontend.gate.admission._status = lambda: old
        for _ in range(10):
            assert made.post(COMPLETIONS, body).status_code == 200
        assert made.post(COMPLETIONS, body | {"timeout": 20}).status_code == 200


def test_of_several_headers_the_earliest_deadline_counts(long: Front):
    """A proxy may add its own to what a client has sent."""
    for values in (("300m", "20"), ("20", "300m")):
        headers = [("x-request-deadline", value) for value in values]
        started_s = time.monotonic()
        assert long.post(CHAT, ENDLESS, headers=headers).status_code == 504
        assert time.monotonic() - started_s < 15
        wait_idle(long)


def test_what_is_told_of_overload_does_not_stay_when_nobody_comes_any_more(monkeypatch):
    monkeypatch.setattr(gate, "LOOK_S", 0.001)
    with loaded(overload_wait_s=5, overload_after_s=3600) as made:
        frontend = made.app.frontend
        assert made.post(COMPLETIONS, {"prompt": [300], "max_tokens": 2}).status_code == 200
        assert "jaxserve_estimated_wait_seconds 98" in frontend.metrics.render().decode()
        looks = 0

        def idle() -> EngineStatus:
            nonlocal looks
            looks += 1
            return dataclasses.replace(busy(), loads=[])

        frontend.gate.admission._status = idle

        async def look() -> None:
            while looks < 2:
                await asyncio.sleep(0)

        made.run(look())
        assert "jaxserve_estimated_wait_seconds 0.0" in frontend.metrics.render().decode()
        made.run(frontend.gate.close())
