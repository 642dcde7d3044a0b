"""Streams over real sockets: clients that leave, read slowly or wait, and engines that die."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from jaxserve.config import HttpConfig
from jaxserve.errors import DeviceFailure
from jaxserve.http.server import Server
from jaxserve.http.sse import HEARTBEAT, EventStream
from tests.http.frontend import CONFIG, Front, chat_prompt, expected
from tests.http.frontend import front as make_front

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def listening(front: Front, config: HttpConfig = CONFIG.http) -> AsyncIterator[tuple]:
    """The application behind uvicorn on a free port; the server and its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    started = asyncio.Event()
    server = Server(front.app, config, started.set)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await started.wait()
    try:
        yield server, listener.getsockname()
    finally:
        server.should_exit = True
        await task


async def request(address: tuple, body: dict, path: str = CHAT) -> tuple:
    """Sends a request; the open connection."""
    reader, writer = await asyncio.open_connection(*address)
    data = json.dumps(body).encode()
    writer.write(
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    await writer.drain()
    return reader, writer


async def until_free(front: Front) -> None:
    """Waits until the engine holds nothing, however many device calls that takes."""
    while True:
        status = await front.client.get_status()
        if (status.running, status.waiting, status.pages_used) == (0, 0, 0):
            return


ENDLESS = {"messages": HI, "ignore_eos": True, "seed": 1}


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_leaves_frees_its_pages(front, stream):
    async def scenario() -> None:
        async with listening(front) as (_, address):
            for _ in range(5):
                reader, writer = await request(address, ENDLESS | {"stream": stream, "n": 4})
                if stream:
                    await reader.readuntil(b'"content":')
                else:
                    while not front.client.num_streams:
                        await front.client.get_status()
                writer.transport.abort()
            while front.app.frontend.num_requests:
                await front.app.frontend.idle()
            await until_free(front)
            assert front.client.num_streams == 0

    front.run(scenario())


def test_pages_are_free_within_two_device_calls():
    with make_front() as front:
        calls = front.engine.engine.executor.calls

        async def scenario() -> None:
            async with listening(front) as (_, address):
                reader, writer = await request(address, ENDLESS | {"stream": True})
                await reader.readuntil(b'"content":')
                cancelled = asyncio.get_running_loop().create_future()
                send = front.client.send

                def watch(message):
                    if type(message).__name__ == "Cancel" and not cancelled.done():
                        cancelled.set_result(len(calls))
                    send(message)

                front.client.send = watch
                writer.transport.abort()
                at_cancel = await cancelled
                await until_free(front)
                assert len(calls) - at_cancel <= 2

        front.run(scenario())


def test_a_hundred_hang_ups_leave_no_pages(front):
    async def hang_up(address: tuple, index: int) -> None:
        reader, writer = await request(address, ENDLESS | {"stream": True, "seed": index})
        if index % 2:
            await reader.readuntil(b'"content":')
        writer.transport.abort()

    async def scenario() -> None:
        async with listening(front) as (_, address):
            await asyncio.gather(*(hang_up(address, index) for index in range(100)))
            reader, writer = await request(address, {"messages": HI, "seed": 3, "max_tokens": 5})
            answer = await reader.readuntil(b"}}}")
            assert b"200 OK" in answer
            writer.close()
            while front.app.frontend.num_requests:
                await front.app.frontend.idle()
            await until_free(front)

    front.run(scenario())


def test_large_bodies_get_their_413_over_a_socket(front):
    async def scenario() -> None:
        async with listening(front) as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(head.encode() + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(160):  # 10 MB
                writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            status = await reader.readline()
            assert status.startswith(b"HTTP/1.1 413")
            await reader.readuntil(b"}}")
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")  # the connection still serves
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()

    front.run(scenario())


@pytest.mark.parametrize(
    ("version", "connection", "framing"),
    [
        ("1.1", "close", "content-length: 10485760"),
        ("1.1", "TE, Close", "transfer-encoding: chunked"),
        ("1.0", "keep-alive", "content-length: 10485760"),
    ],
)
def test_a_413_reaches_who_closes_after_it(
    front, version: str, connection: str, framing: str
) -> None:
    """As `urllib` does, which sends all of its body before it reads."""

    async def scenario() -> None:
        async with listening(front) as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            head = f"POST {CHAT} HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}connection: {connection}\r\n{framing}\r\n\r\n".encode())
            piece = b"a" * 65536
            for _ in range(160):
                writer.write(piece if "length" in framing else b"10000\r\n" + piece + b"\r\n")
                await writer.drain()
            if "chunked" in framing:
                writer.write(b"0\r\n\r\n")
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 413") and answer.endswith(b"}}")
            writer.close()

    front.run(scenario())


def test_a_slow_readers_tokens_are_merged(front):
    """While `send` holds the first event back, the rest of the answer becomes one more."""

    async def scenario() -> None:
        body = json.dumps(ENDLESS | {"stream": True, "max_tokens": 200}).encode()
        scope = {
            "type": "http", "method": "POST", "path": CHAT,
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        bodies = []
        forever = asyncio.Event()
        first = True

        async def receive():
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body}
            return await forever.wait()

        async def send(message):
            if message["type"] == "http.response.body":
                bodies.append(message["body"])
                if len(bodies) == 1:
                    await front.client.join()

        await front.app(scope, receive, send)
        prompt = chat_prompt("hi")
        assert len(bodies) == 3  # the first tokens, all others, [DONE]
        texts = [
            choice["delta"].get("content", "")
            for line in b"".join(bodies).decode().split("\n\n")
            if line.startswith("data: {")
            for choice in json.loads(line.removeprefix("data: "))["choices"]
        ]
        wanted = expected(prompt, seed=1, max_tokens=200, ignore_eos=True)[1]
        assert "".join(texts) == wanted

    front.run(scenario())


def test_a_silent_stream_gets_heartbeats_and_opens_with_one(front):
    async def scenario() -> None:
        sent: asyncio.Queue = asyncio.Queue()
        events = EventStream(sent.put, heartbeat_s=0.01)
        assert (await sent.get())["status"] == 200
        for _ in range(3):
            assert (await sent.get())["body"] == HEARTBEAT
        await events.write(b"data: 1\n\n")
        await events.end(b"data: [DONE]\n\n")
        rest = [sent.get_nowait() for _ in range(sent.qsize())]
        assert [message["body"] for message in rest if message["body"] != HEARTBEAT] == [
            b"data: 1\n\n",
            b"data: [DONE]\n\n",
        ]
        assert all(message["type"] == "http.response.body" for message in rest)

    front.run(scenario())


def test_too_many_waiting_is_a_503_with_retry_after():
    with make_front() as front:
        body = {"messages": HI, "max_tokens": 100, "ignore_eos": True, "n": 16}

        async def scenario() -> list:
            return await asyncio.gather(*(front.http.post(CHAT, json=body) for _ in range(40)))

        answers = front.run(scenario())
        refused = [answer for answer in answers if answer.status_code == 503]
        assert {answer.status_code for answer in answers} == {200, 503}
        told = [int(answer.headers["retry-after-ms"]) for answer in refused]
        assert len(set(told)) == len(told) and 1000 <= min(told) < max(told) <= 60_000
        assert all(answer.json()["error"]["code"] == "overloaded" for answer in refused)
        front.run(until_free(front))


def test_an_engine_that_dies_ends_streams_with_an_error_event():
    with make_front() as front:

        async def scenario() -> None:
            async with listening(front) as (_, address):
                reader, writer = await request(address, ENDLESS | {"stream": True})
                await reader.readuntil(b'"content":')
                front.client.fail(DeviceFailure("the engine process has ended"))
                rest = (await reader.readuntil(b"\r\n0\r\n\r\n")).decode()
                error = json.loads(rest[rest.index('{"error"') : rest.rindex("}") + 1])
                assert error["error"]["code"] == "engine_failure"
                assert error["error"]["type"] == "server_error"
                assert "[DONE]" not in rest
                writer.close()

        front.run(scenario())
        health = front.get("/health")
        assert health.status_code == 503
        assert health.json()["engines"][0]["state"] == "failed"
        assert front.get("/ready").status_code == 503
        answer = front.post(CHAT, {"messages": HI})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failure")


def test_draining_refuses_new_work_and_finishes_the_old():
    with make_front() as front:

        async def scenario() -> None:
            async with listening(front) as (server, address):
                reader, writer = await request(address, ENDLESS | {"stream": True})
                await reader.readuntil(b'"content":')
                drain = asyncio.create_task(server.drain())
                while not front.app.frontend.draining:
                    await front.client.get_status()
                refused, other = await request(address, {"messages": HI})
                head = await refused.readuntil(b"\r\n\r\n")
                assert b" 503 " in head and b"connection: close" in head
                assert (await front.http.get("/ready")).json() == {"status": "draining"}
                assert b"[DONE]" in await reader.readuntil(b"\r\n0\r\n\r\n")
                await drain
                writer.close()
                other.close()

        front.run(scenario())


def test_drain_is_bounded():
    with make_front() as front:
        config = HttpConfig(drain_timeout_s=0.0)

        async def scenario() -> None:
            async with listening(front, config) as (server, address):
                reader, writer = await request(address, ENDLESS | {"stream": True, "n": 8})
                await reader.readuntil(b'"content":')
                await server.drain()
                rest = await reader.read()
                assert b"overloaded" in rest or b"[DONE]" in rest
                writer.close()

        front.run(scenario())
