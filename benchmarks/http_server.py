"""What does an event of a stream cost the HTTP process, beside a bare Starlette response?

Method: one HTTP process serves both, in interleaved rounds of the same number of streams, events
and bytes, read by one client process that takes bytes and counts events:

    jaxserve   /v1/chat/completions: protocol, detokenizing, JSON, metrics, heartbeats, watching
               for departures; over ZeroMQ, a process in place of the engine that gives each
               sequence one token a step and sleeps between (an engine that computes would share
               cores and caches with one arm only)
    paced      a bare Starlette StreamingResponse of the very bytes that an event of ours has; all
               streams are woken once a step, by a timer
    unpaced    the same, without ever waiting: nothing but Starlette and uvicorn

CPU time (user and system, all threads) of the HTTP process is divided by the events that reached
the client, requests' own cost included. The target is jaxserve / paced ≤ 2.

    python benchmarks/http_server.py [--streams 64] [--tokens 128] [--rounds 10]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).parent.parent))  # the fakes are in tests/

from jaxserve.bench.stats import environment, json_line, median, ratio_interval
from jaxserve.config import HttpConfig
from jaxserve.http.app import create_app
from jaxserve.http.server import Server
from jaxserve.protocol.client import EngineClient
from jaxserve.protocol.messages import Finished, GetStatus, SequenceRecord, Submit, TokenEvents
from jaxserve.protocol.parent import follow_parent
from jaxserve.protocol.status import EngineStatus
from jaxserve.protocol.zmq import ZmqClient, ZmqServer
from jaxserve.types import FinishReason, ModelInfo
from tests.fakes.tokenizer import CHAT_TEMPLATE, ByteTokenizer

ARMS = ("jaxserve", "paced", "unpaced")
MESSAGE = {"role": "user", "content": "hi there, fake. "}
#: Time between steps; the event loop is idle for part of it, as in real life.
STEP_S = 0.008

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk",'
    b'"created":1795487389,"model":"fake","choices":[{"index":0,"delta":{"content":" w333"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)


class Ticker:
    """Wakes all who wait, once a step."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def wait(self) -> None:
        """Waits for the next step."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        future = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        await future

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            waiters, self._waiters = self._waiters, []
            for future in waiters:
                if not future.done():
                    future.set_result(None)


def bare_app() -> Starlette:
    """The two yardsticks."""
    ticker = Ticker()

    async def events(num_events: int, paced: bool) -> AsyncIterator[bytes]:
        for _ in range(num_events):
            if paced:
                await ticker.wait()
            yield EVENT

    async def stream(request: Request) -> StreamingResponse:
        document = await request.json()
        body = events(document["max_tokens"], request.url.path == "/paced")
        return StreamingResponse(body, media_type="text/event-stream")

    async def cpu(request: Request) -> JSONResponse:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return JSONResponse({"cpu_s": usage.ru_utime + usage.ru_stime})

    return Starlette(
        routes=[
            Route("/paced", stream, methods=["POST"]),
            Route("/unpaced", stream, methods=["POST"]),
            Route("/cpu", cpu),
        ]
    )


def run_engine(address: str) -> None:
    """The process in place of the engine: one token a step for all that was submitted."""
    follow_parent()
    server = ZmqServer(address)
    model = ModelInfo(
        name="fake", max_context=4096, vocab_size=512, eos_token_ids=(2,), cache_groups=()
    )
    left: dict[int, int] = {}
    client: Any = None
    for step in itertools.count():
        at_s = time.monotonic() + STEP_S
        while (wait_s := at_s - time.monotonic()) > 0:
            for client, message in server.receive(wait_s):
                match message:
                    case Submit():
                        left |= dict.fromkeys(message.sequence_ids, message.sampling.max_tokens)
                    case GetStatus():
                        status = EngineStatus(
                            state="ready",
                            pid=os.getpid(),
                            step_age_s=0.0,
                            model=model,
                            answers=message.number,
                        )
                        server.send(client, status)
        if left:
            events = TokenEvents(step_id=step, at_ns=time.monotonic_ns())
            for sequence_id in list(left):
                events.sequence_ids.append(sequence_id)
                events.token_ids.append([333])
                left[sequence_id] -= 1
                if not left[sequence_id]:
                    del left[sequence_id]
                    events.finished.append(
                        Finished(
                            sequence_id=sequence_id,
                            reason=FinishReason.LENGTH,
                            record=SequenceRecord(),
                        )
                    )
            server.send(client, events)


async def serve(listener: socket.socket, address: str) -> None:
    """The HTTP process: both applications behind one uvicorn."""
    from jaxserve.text.template import ChatTemplate

    client = EngineClient(ZmqClient(address))
    await client.start()
    await client.ready()
    app = create_app(
        client, ByteTokenizer(), ChatTemplate(CHAT_TEMPLATE), HttpConfig(), page_size=16
    )
    bare = bare_app()

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await (app if scope["path"].startswith("/v1") else bare)(scope, receive, send)

    server = Server(app, HttpConfig(), lambda: None)
    server.config.app = both
    await server.run_on(listener, lambda: os._exit(1))
    await client.close()


async def exchange(port: int, path: str, body: Any = None) -> bytes:
    """One request on a connection of its own; the response's bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else msgspec.json.encode(body)
    writer.write(
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    response = await reader.read()
    writer.close()
    return response


async def cpu_s(port: int) -> float:
    """CPU seconds that the HTTP process has used."""
    response = await exchange(port, "/cpu")
    return msgspec.json.decode(response.partition(b"\r\n\r\n")[2])["cpu_s"]


async def one_round(port: int, arm: str, num_streams: int, num_tokens: int) -> tuple[float, int]:
    """CPU microseconds an event, and how many events came."""
    path = "/v1/chat/completions" if arm == "jaxserve" else f"/{arm}"
    body = {"stream": True, "max_tokens": num_tokens, "messages": [MESSAGE], "ignore_eos": True}
    before = await cpu_s(port)
    responses = await asyncio.gather(
        *(exchange(port, path, body | {"seed": seed}) for seed in range(num_streams))
    )
    used = await cpu_s(port) - before
    assert all(b" 200 " in response[:20] for response in responses), responses[0][:500]
    num_events = sum(response.count(b"data: {") for response in responses)
    return used * 1e6 / num_events, num_events


async def measure(port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the record."""
    costs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    events: dict[str, list[int]] = {arm: [] for arm in ARMS}
    for number in range(arguments.rounds + 1):
        for arm in ARMS[:: 1 if number % 2 else -1]:
            cost, num = await one_round(port, arm, arguments.streams, arguments.tokens)
            if number:  # the first warms up
                costs[arm].append(cost)
                events[arm].append(num)
    record: dict[str, Any] = {"benchmark": "http", "streams": arguments.streams}
    record |= {f"{arm}_us_an_event": median(costs[arm]) for arm in ARMS}
    record |= {f"{arm}_events": median(events[arm]) for arm in ARMS}
    for arm in ARMS[1:]:
        record[f"ratio_to_{arm}"] = ratio_interval(costs["jaxserve"], costs[arm])
    return record | environment()


def run(arguments: argparse.Namespace) -> None:
    """Starts the processes and prints the record."""
    directory = tempfile.mkdtemp(prefix="jaxserve-bench-")
    address = f"ipc://{directory}/engine"
    engine = subprocess.Popen([sys.executable, __file__, "--engine", "--address", address])
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        fd = listener.fileno()
        command = [sys.executable, __file__, "--child", str(fd), "--address", address]
        child = subprocess.Popen(command, pass_fds=[fd])
        try:
            record = asyncio.run(measure(listener.getsockname()[1], arguments))
        finally:
            child.kill()
            child.wait()
            engine.kill()
            engine.wait()
            shutil.rmtree(directory)
    print(json_line(record))


def main(loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop) -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description="What an event of a stream costs.")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(arguments.address)
    if arguments.child is None:
        run(arguments)
        return
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(serve(socket.socket(fileno=arguments.child), arguments.address))


if __name__ == "__main__":
    main()
