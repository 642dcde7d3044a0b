"""Many streams at once against a server whose engine is being killed: the parts of such tests."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.http.test_serve import TIMEOUT_S, children, command

#: Modules of tests.fakes that are engines.
ENGINES = ("engine", "killer", "paced_engine")
#: Everything that a storm does is done within this time.
STORM_S = 120


@dataclass
class Heard:
    """What one client has heard of its stream.

    Attributes:
        tokens: by choice, in the order they came.
        error: of the event that ended it, if one did.
        done: whether it ended with [DONE].
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    done: bool = False
    heartbeats: int = 0

    @property
    def num_tokens(self) -> int:
        """So far."""
        return sum(map(len, self.tokens.values()))

    def take(self, line: str) -> None:
        """One line of the stream."""
        if line.startswith(":"):
            self.heartbeats += 1
        if line == "data: [DONE]":
            self.done = True
        if not line.startswith("data: {"):
            return
        assert not self.done and self.error is None, "something came after the end"
        document = json.loads(line.removeprefix("data: "))
        self.error = document.get("error")
        self.usage = document.get("usage") or self.usage
        for choice in document.get("choices", ()):
            index = choice["index"]
            tokens = self.tokens.setdefault(index, [])
            if choice.get("token_ids"):
                assert index not in self.finish_reasons, "a token came after the choice's end"
                tokens += choice["token_ids"]
            if choice.get("logprobs"):
                values = self.logprobs.setdefault(index, [])
                values += choice["logprobs"]["token_logprobs"]
            if choice.get("finish_reason"):
                assert index not in self.finish_reasons, "a choice ended twice"
                self.finish_reasons[index] = choice["finish_reason"]


async def listen(client: httpx.AsyncClient, body: dict[str, Any], heard: Heard) -> None:
    """Streams one completion to its end."""
    options = {"include_usage": True}
    body = body | {"stream": True, "return_token_ids": True, "stream_options": options}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            heard.take(line)


def client_of(base: str) -> httpx.AsyncClient:
    """A client with as many connections as streams."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=base, timeout=STORM_S, limits=limits)


def engine_of(server_pid: int) -> int | None:
    """The engine's pid, if there is one now."""
    for pid in children(server_pid):
        try:
            if any(f"fakes.{name}" in command(pid) for name in ENGINES):
                return pid
        except OSError:  # it ended just now
            pass
    return None


async def strike(server_pid: int, number: signal.Signals) -> int:
    """Sends a signal to the engine that runs; its pid."""
    pid = await until(lambda: engine_of(server_pid))
    os.kill(pid, number)
    return pid


async def until(condition: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """Waits until a condition holds; its value."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "it does not come"
        await asyncio.sleep(0.01)
    return value


async def ready(client: httpx.AsyncClient) -> None:
    """Waits until /ready says so, of several workers several times."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (await client.get("/ready")).status_code != 200:
        assert time.monotonic() < deadline_s, "it does not get ready"
        await asyncio.sleep(0.02)


def metric(base: str, name: str) -> float:
    """A sample of /metrics."""
    for line in httpx.get(f"{base}/metrics", timeout=TIMEOUT_S).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise AssertionError(f"no {name}")
