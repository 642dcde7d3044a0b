"""Adapters through a whole server: two HTTP processes, an engine of its own, and its death."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from jaxserve.types import SamplingParams
from tests.fakes.engine import oracle
from tests.http.storm import STORM_S, Heard, client_of, engine_of, listen, ready, strike, until
from tests.http.test_adapters import written
from tests.http.test_serve import address_of, started

NUM_STREAMS = 24
NUM_TOKENS = 200
SETTINGS = (
    "http.workers=2",
    "model.max_context=1024",
    "scheduler.max_rows=64",
    "engine.restart_backoff_s=0.05",
    "lora.enabled=true",
    "lora.classes=4x3",
)


def test_streams_with_adapters_survive_the_engines_death(tmp_path: Path) -> None:
    """And a reload of their name meanwhile: each goes on with the content that it began with."""
    old, other = written(tmp_path / "a", 1), written(tmp_path / "b", 2)
    requests = [
        {
            "model": ("live", "other", None)[seed % 3],
            "prompt": [3 + seed, 4, 5],
            "seed": seed,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
        }
        for seed in range(NUM_STREAMS)
    ]
    keys = {"live": old, "other": other, None: None}
    heard = [Heard() for _ in requests]

    async def storm(base: str, server_pid: int) -> None:
        async with client_of(base) as client:
            await ready(client)
            for name, directory in (("live", "a"), ("other", "b")):
                load = {"lora_name": name, "lora_path": str(tmp_path / directory)}
                response = await client.post(f"{base}/v1/load_lora_adapter", json=load)
                assert response.status_code == 200, response.text
            for _ in range(8):  # each HTTP process lists both, whichever answers
                rows = (await client.get(f"{base}/v1/models")).json()["data"]
                assert {"live", "other"} <= {row["id"] for row in rows}
            streams = [
                asyncio.create_task(listen(client, *pair))
                for pair in zip(requests, heard, strict=True)
            ]
            goal = NUM_STREAMS * NUM_TOKENS // 10
            await until(lambda: sum(h.num_tokens for h in heard) >= goal, STORM_S)
            written(tmp_path / "a", 3)
            load = {"lora_name": "live", "lora_path": str(tmp_path / "a"), "load_inplace": True}
            response = await client.post(f"{base}/v1/load_lora_adapter", json=load)
            assert response.json()["hash"] != old
            pid = await strike(server_pid, signal.SIGKILL)
            await until(lambda: engine_of(server_pid) not in (None, pid))
            await asyncio.gather(*streams)

    with started(*SETTINGS) as process:
        asyncio.run(asyncio.wait_for(storm(address_of(process), process.pid), STORM_S))
        process.send_signal(signal.SIGTERM)
        assert process.wait(STORM_S) == 0
    for request, found in zip(requests, heard, strict=True):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=request["seed"], ignore_eos=True)
        assert found.done and found.error is None
        key = keys[request["model"]]
        assert found.tokens[0] == oracle(request["prompt"], sampling, adapter=key)
