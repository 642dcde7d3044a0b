"""Streams that survive the engine's death: nothing twice, nothing missing, nobody condemned."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import httpx

from jaxserve.types import SamplingParams
from tests.fakes.engine import oracle
from tests.fakes.killer import HANGER, KILLER
from tests.http.storm import (
    STORM_S,
    Heard,
    client_of,
    engine_of,
    listen,
    metric,
    ready,
    strike,
    until,
)
from tests.http.test_serve import address_of, started, wait_ready

SETTINGS = (
    "http.workers=2",
    "http.heartbeat_s=0.2",
    "scheduler.max_rows=128",
    "model.max_context=1024",
    "engine.restart_backoff_s=0.05",
    "engine.step_deadline_floor_s=1.5",
)
NUM_STREAMS = 100
NUM_TOKENS = 400


def body(seed: int, **values) -> dict:
    """A request whose tokens the oracle knows."""
    prompt = [3 + seed % 200, 4, 5, 6 + seed % 7]
    plain = {"prompt": prompt, "seed": seed, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return plain | values


def expected(request: dict, choice: int = 0) -> list[int]:
    """Its tokens."""
    names = ("seed", "max_tokens", "ignore_eos")
    sampling = SamplingParams(**{name: request[name] for name in names})
    return oracle(request["prompt"], sampling, choice)


def test_five_deaths_of_the_engine_cost_no_stream_a_token() -> None:
    requests = [body(seed) for seed in range(NUM_STREAMS)]
    heard = [Heard() for _ in requests]

    async def storm(base: str, server_pid: int) -> None:
        async with client_of(base) as client:
            await ready(client)
            streams = [
                asyncio.create_task(listen(client, *pair))
                for pair in zip(requests, heard, strict=True)
            ]
            for death in range(5):
                goal = sum(h.num_tokens for h in heard) + NUM_STREAMS * NUM_TOKENS // 20
                await until(lambda goal=goal: sum(h.num_tokens for h in heard) >= goal, STORM_S)
                number = signal.SIGSTOP if death % 2 else signal.SIGKILL
                pid = await strike(server_pid, number)
                await until(lambda pid=pid: engine_of(server_pid) not in (None, pid))
            await asyncio.gather(*streams)

    with started(*SETTINGS) as process:
        base = address_of(process)
        asyncio.run(asyncio.wait_for(storm(base, process.pid), STORM_S))
        process.send_signal(signal.SIGTERM)
        assert process.wait(STORM_S) == 0
        log = process.stderr.read()
    for request, found in zip(requests, heard, strict=True):
        assert found.done and found.error is None
        assert found.tokens[0] == expected(request)
        assert found.finish_reasons == {0: "length"}
        assert found.usage["completion_tokens"] == NUM_TOKENS
    assert log.count("it is started again") == 5, log
    assert log.count("over its deadline; it is killed") == 2, log


def serve_all(requests: list[dict], *settings: str) -> tuple[list[Heard], str, dict[str, float]]:
    """Streams them at once to a server that some of them harm; what was heard, log and metrics."""
    heard = [Heard() for _ in requests]
    metrics: dict[str, float] = {}

    async def storm(base: str) -> None:
        async with client_of(base) as client:
            await ready(client)
            await asyncio.gather(*map(listen, [client] * len(heard), requests, heard))
        for name in ("engine_restarts", "requests_replayed", "requests_quarantined"):
            metrics[name] = metric(base, f"jaxserve_{name}_total")

    with started(*SETTINGS, "engine=tests.fakes.killer", *settings) as process:
        asyncio.run(asyncio.wait_for(storm(address_of(process)), STORM_S))
        process.send_signal(signal.SIGTERM)
        assert process.wait(STORM_S) == 0
        log = process.stderr.read()
    return heard, log, metrics


def test_who_kills_the_engine_is_the_only_one_to_fail() -> None:
    requests = [body(seed, max_tokens=200) for seed in range(40)]
    requests[17]["prompt"] = [KILLER, 5, 6]
    heard, log, metrics = serve_all(requests)
    for index, (request, found) in enumerate(zip(requests, heard, strict=True)):
        if index == 17:
            assert found.error["code"] == "request_quarantined"
            assert found.error["type"] == "server_error" and not found.done
            tokens = found.tokens.get(0, [])
            assert tokens == expected(request)[: len(tokens)]
        else:
            assert found.done and found.tokens[0] == expected(request)
    # Two deaths together, then groups of about 10, 3 and 1, and once more if not first of all.
    assert 5 <= metrics["engine_restarts"] <= 6
    assert log.count("the engine process ended with status 70") == metrics["engine_restarts"]
    assert log.count("has ended the engine alone and is not run again") == 1
    assert metrics["requests_quarantined"] == 1


def test_who_hangs_the_engine_is_found_by_its_deadlines() -> None:
    requests = [body(seed, max_tokens=100) for seed in range(3)]
    requests[1]["prompt"] = [HANGER, 5, 6]
    heard, log, metrics = serve_all(requests, "engine.step_deadline_factor=2")
    assert [found.error and found.error["code"] for found in heard] == [
        None,
        "request_quarantined",
        None,
    ]
    assert heard[0].tokens[0] == expected(requests[0])
    assert heard[2].tokens[0] == expected(requests[2])
    assert log.count("over its deadline; it is killed") == metrics["engine_restarts"]


def test_a_request_that_is_not_streamed_gets_its_quarantine_as_a_500() -> None:
    with started(*SETTINGS, "engine=tests.fakes.killer") as process:
        base = address_of(process)
        wait_ready(base)
        request = body(1, prompt=[KILLER, 5], max_tokens=50)
        answer = httpx.post(f"{base}/v1/completions", json=request, timeout=STORM_S)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "request_quarantined"
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        good = body(2, max_tokens=20)
        answer = httpx.post(f"{base}/v1/completions", json=good, timeout=STORM_S)
        assert answer.json()["usage"]["completion_tokens"] == 20


async def dies(client: httpx.AsyncClient, server_pid: int) -> dict[str, Any]:
    """Kills the engine that serves; returns what /health says while it is started again."""
    await strike(server_pid, signal.SIGKILL)
    while True:
        health = await client.get("/health")
        assert health.status_code == 200
        if health.json()["engines"][0]["state"] == "restarting":
            return health.json()


async def beginning(
    client: httpx.AsyncClient, requests: list[dict], heard: list[Heard]
) -> list[asyncio.Task[None]]:
    """Streams that each have brought something."""
    await ready(client)
    streams = [
        asyncio.create_task(listen(client, *pair)) for pair in zip(requests, heard, strict=True)
    ]
    await until(lambda: all(found.num_tokens for found in heard))
    return streams


SLOWLY = ("scheduler.max_rows=8", "scheduler.max_step_tokens=16")


def test_the_server_while_its_engine_is_started_again() -> None:
    """Probes, requests that come meanwhile, clients that leave meanwhile, and SIGTERM meanwhile."""
    requests = [body(seed, n=2, logprobs=1, max_tokens=1000) for seed in range(3)]
    heard = [Heard() for _ in requests]
    late = Heard()

    async def scenario(base: str, process: Any) -> None:
        async with client_of(base) as client:
            streams = await beginning(client, requests, heard)
            health = await dies(client, process.pid)
            assert health["status"] == "ok"
            not_ready = await client.get("/ready")
            while not_ready.status_code == 200:  # the other worker has not heard of it
                not_ready = await client.get("/ready")
            assert not_ready.json()["status"] == "restarting"
            coming = asyncio.create_task(listen(client, body(7, max_tokens=50), late))
            streams[0].cancel()  # hangs up
            await asyncio.gather(streams[0], return_exceptions=True)
            await until(lambda: late.heartbeats)
            await asyncio.gather(*streams[1:], coming)
            assert late.tokens[0] == expected(body(7, max_tokens=50))
            again = [Heard(), Heard()]
            streams = await beginning(client, requests[:2], again)
            await dies(client, process.pid)
            process.send_signal(signal.SIGTERM)
            await asyncio.gather(*streams)
            heard.extend(again)

    with started(*SETTINGS, *SLOWLY) as process:
        base = address_of(process)
        asyncio.run(asyncio.wait_for(scenario(base, process), STORM_S))
        assert process.wait(STORM_S) == 0
        assert "Traceback" not in process.stderr.read()
    for request, found in zip([*requests, *requests[:2]], heard, strict=True):
        if found is heard[0]:
            continue
        assert found.done and found.usage["completion_tokens"] == 2000
        assert found.tokens == {choice: expected(request, choice) for choice in range(2)}
        assert [len(found.logprobs[choice]) for choice in range(2)] == [1000, 1000]


def test_once_the_budget_is_spent_streams_fail_and_the_server_ends() -> None:
    heard = Heard()

    async def scenario(base: str, server_pid: int) -> None:
        async with client_of(base) as client:
            (stream,) = await beginning(client, [body(1, n=4, max_tokens=1000)], [heard])
            for _ in range(2):
                tokens = heard.num_tokens
                await until(lambda tokens=tokens: heard.num_tokens > tokens)
                await strike(server_pid, signal.SIGKILL)
            await stream

    with started(*SETTINGS, *SLOWLY, "engine.max_restarts=1") as process:
        base = address_of(process)
        asyncio.run(asyncio.wait_for(scenario(base, process.pid), STORM_S))
        assert process.wait(STORM_S) == 1
        log = process.stderr.read()
    assert heard.error["code"] == "engine_failure" and not heard.done
    assert "engine.max_restarts=1" in heard.error["message"]
    assert log.count("it is started again") == 1 and "engine.max_restarts=1" in log


def test_requests_that_come_late_in_a_restart_are_refused() -> None:
    async def scenario(base: str, server_pid: int) -> None:
        async with client_of(base) as client:
            await ready(client)
            await dies(client, server_pid)
            answer = await client.post("/v1/completions", json=body(1))
            while answer.status_code == 200:  # by the worker that has not heard of it
                answer = await client.post("/v1/completions", json=body(1, max_tokens=1))
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert "restarting" in answer.json()["error"]["message"]

    with started(*SETTINGS, "http.restart_wait_s=0") as process:
        base = address_of(process)
        asyncio.run(asyncio.wait_for(scenario(base, process.pid), STORM_S))
