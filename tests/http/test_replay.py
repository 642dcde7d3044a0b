"""Streams that survive the engine's death: nothing twice, nothing missing, nobody condemned."""

from __future__ import annotations

import asyncio
import signal

from jaxserve.types import SamplingParams
from tests.fakes.engine import oracle
from tests.http.storm import STORM_S, Heard, client_of, listen, ready, strike, until
from tests.http.test_serve import address_of, started

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
                await strike(server_pid, number)
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
    print(log)
    assert log.count("it is started again") == 5
