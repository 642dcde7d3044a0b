"""The load generator against a small fake server that streams events."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from jaxserve.bench import cli
from jaxserve.bench.load import (
    Objectives,
    Outcome,
    Run,
    judge,
    report,
    run_closed,
    run_open,
    sender,
)
from jaxserve.bench.sse import BodyDecoder, Response, Target, post_stream
from jaxserve.bench.workload import Lengths, Request, synthetic_requests

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(payload: Any) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return f"data: {text}\n\n".encode()


def token(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


async def whole(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(b": heartbeat\n\n"))
    num_tokens = body["max_tokens"]
    for index in range(num_tokens):
        data = event(token("x", "length" if index == num_tokens - 1 else None))
        writer.write(chunk(data[:7]) + chunk(data[7:]))  # events need not end where chunks do
        await writer.drain()
    writer.write(chunk(event(usage(len(body["prompt"]), num_tokens))))
    writer.write(chunk(event("[DONE]")) + b"0\r\n\r\n")


async def cut(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(event(token("x"))))


async def without_done(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(event(token("x", "length"))) + b"0\r\n\r\n")


async def short(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await whole({**body, "max_tokens": body["max_tokens"] - 1}, writer)


async def busy(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    reply = b'{"error": {"message": "queue full"}}'
    writer.write(
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(reply)}\r\n\r\n".encode()
        + reply
    )


async def failing(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(event({"error": {"message": "engine died"}})) + b"0\r\n\r\n")


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Target]:
    work = [1000, 2000]  # as counted so far

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if head.startswith(b"GET /v1/models"):
            reply = b'{"data": [{"id": "fake"}]}'
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(reply)}\r\n\r\n".encode())
            writer.write(reply)
        elif head.startswith(b"GET /metrics"):
            reply = b"# TYPE jaxserve_step_flops counter\njaxserve_step_flops_total %d\n" % work[0]
            reply += b"jaxserve_step_bytes_total %d\n" % work[1]
            work[:] = work[0] + 6_000_000, work[1] + 3_000_000
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(reply))
            writer.write(reply)
        else:
            await answer(json.loads(body), writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1])


def requests(count: int, output: str = "5") -> list[Request]:
    return synthetic_requests(
        num_requests=count,
        model="fake",
        prompt_tokens=Lengths.parse("7"),
        output_tokens=Lengths.parse(output),
        vocab_size=100,
    )


def run_against(answer: Answer, count: int = 6) -> tuple[Run, int]:
    done = 0

    def on_done() -> None:
        nonlocal done
        done += 1

    async def main() -> Run:
        async with serving(answer) as target:
            return await run_closed(sender(target, 30.0, on_done), requests(count), 3)

    return asyncio.run(main()), done


def test_whole_streams_are_counted_token_by_token() -> None:
    run, done = run_against(whole)
    assert done == 6
    assert [outcome.error for outcome in run.outcomes] == [""] * 6
    assert {(o.prompt_tokens, o.output_tokens) for o in run.outcomes} == {(7, 5)}
    assert {len(outcome.gaps_s) for outcome in run.outcomes} == {4}
    for outcome in run.outcomes:
        assert 0 < outcome.ttft_s <= outcome.e2e_s
        assert outcome.tpot_s == pytest.approx(sum(outcome.gaps_s) / 4)
    record = report(run, Objectives())
    assert record["whole"] == record["requests"] == 6
    assert record["output_tokens_per_s"] == pytest.approx(30 / run.seconds)
    assert record["good_share"] == 1.0


@pytest.mark.parametrize(
    ("answer", "kind", "detail"),
    [
        (cut, "truncated", "closed by the server"),
        (without_done, "truncated", r"no \[DONE\]"),
        (short, "truncated", "4 of 5 tokens"),
        (busy, "status 503", "queue full"),
        (failing, "error event", "engine died"),
    ],
)
def test_what_is_not_whole_is_counted_by_kind(answer: Answer, kind: str, detail: str) -> None:
    run, _ = run_against(answer)
    assert {outcome.error for outcome in run.outcomes} == {kind}
    record = report(run, Objectives())
    assert record["whole"] == 0
    assert record["truncated"] == (6 if kind == "truncated" else 0)
    assert record["errors"] == ({} if kind == "truncated" else {kind: 6})
    assert record["ttft_ms"] == {}
    assert re.search(detail, record["error_examples"][kind])


def test_nobody_listens() -> None:
    response = asyncio.run(post_stream(Target(host="127.0.0.1", port=1), "/x", b"", timeout_s=5.0))
    assert response.status == 0
    assert judge(requests(1)[0], response, 0.0).error == "no answer"


def test_a_silent_server_times_out() -> None:
    async def main() -> Response:
        release = asyncio.Event()

        async def silent(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
            await release.wait()

        async with serving(silent) as target:
            response = await post_stream(target, "/v1/completions", b"{}", timeout_s=0.05)
            release.set()
            return response

    assert asyncio.run(main()).error == "nothing whole after 0.05 s"


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def main() -> tuple[int, Run]:
        release = asyncio.Event()
        waiting = 0

        async def send(request: Request) -> Response:
            nonlocal waiting
            waiting += 1
            if waiting == 50:
                release.set()  # only reached if all were sent without an answer to the first
            await release.wait()
            return Response(status=200)

        run = await run_open(send, requests(50), rate=float("inf"))
        return waiting, run

    waiting, run = asyncio.run(main())
    assert waiting == 50
    assert len(run.outcomes) == 50


def test_a_closed_loop_keeps_its_concurrency() -> None:
    async def main() -> int:
        running = most = 0

        async def send(request: Request) -> Response:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return Response(status=200)

        await run_closed(send, requests(20), concurrency=4)
        return most

    assert asyncio.run(main()) == 4


def test_latency_counts_from_when_the_request_was_due() -> None:
    response = Response(
        status=200,
        complete=True,
        started_s=12.0,
        ended_s=15.0,
        events=[
            (13.0, json.dumps(token("a")).encode()),
            (14.0, json.dumps(token("b")).encode()),
            (15.0, json.dumps(token("c", "stop")).encode()),
            (15.0, b"[DONE]"),
        ],
    )
    outcome = judge(Request(path="/", body=b""), response, due_s=10.0)
    assert (outcome.ttft_s, outcome.tpot_s, outcome.e2e_s) == (3.0, 1.0, 5.0)
    assert outcome.output_tokens == 3
    assert Objectives(ttft_ms=3000, tpot_ms=1000, e2e_ms=5000).are_met(outcome)
    assert not Objectives(ttft_ms=2999).are_met(outcome)
    assert not Objectives(tpot_ms=999).are_met(outcome)
    assert not Objectives(e2e_ms=4999).are_met(outcome)


def test_goodput_counts_only_good_requests() -> None:
    outcomes = [Outcome(ttft_s=0.1), Outcome(ttft_s=0.3), Outcome(error="status 500")]
    run = Run(outcomes=outcomes, seconds=2.0, max_lateness_s=0.0)
    record = report(run, Objectives(ttft_ms=200))
    assert record["goodput_requests_per_s"] == 0.5
    assert record["requests_per_s"] == 1.0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunked_bodies_may_be_cut_anywhere(size: int) -> None:
    wire = chunk(b"hello ") + b"5;name=value\r\nworld\r\n" + b"0\r\n\r\n"
    decoder = BodyDecoder(chunked=True)
    out = b"".join(decoder.feed(wire[i : i + size]) for i in range(0, len(wire), size))
    assert out == b"hello world"
    assert decoder.ended


def test_a_malformed_chunk_is_told() -> None:
    with pytest.raises(ValueError):
        BodyDecoder(chunked=True).feed(b"zz\r\n")


@pytest.mark.parametrize(
    ("url", "port", "tls", "base"),
    [
        ("http://h:81/v1/", 81, False, ""),
        ("http://h/proxy/v1", 80, False, "/proxy"),
        ("https://h", 443, True, ""),
    ],
)
def test_addresses(url: str, port: int, tls: bool, base: str) -> None:
    target = Target.parse(url, "key")
    assert (target.host, target.port, target.tls, target.base_path) == ("h", port, tls, base)
    assert target.headers == {"Authorization": "Bearer key"}


def test_a_bad_address_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--url", "localhost:8000"]) == 1
    assert "is not an http:// or https:// address" in capsys.readouterr().err


def test_the_command_line_tells_the_servers_work_and_its_share_of_the_limits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def main() -> int:
        async with serving(whole) as target:
            words = ["serve", "--url", f"http://127.0.0.1:{target.port}", "--requests", "6"]
            words += ["--output-tokens", "4", "--prompt-tokens", "3", "--concurrency", "2"]
            words += ["--matmul-flops-per-s", "1e9", "--read-bytes-per-s", "1e8"]
            return await asyncio.to_thread(cli.run, words)

    assert asyncio.run(main()) == 0
    output = capsys.readouterr()
    record = json.loads(output.out)
    assert (record["whole"], record["truncated"], record["errors"]) == (6, 0, {})
    assert record["flops_per_s"] * record["seconds"] == pytest.approx(6_000_000, rel=1e-4)
    assert record["bytes_per_s"] * record["seconds"] == pytest.approx(3_000_000, rel=1e-4)
    assert record["mfu"] == pytest.approx(record["flops_per_s"] / 1e9, rel=1e-4)
    assert record["mbu"] == pytest.approx(record["bytes_per_s"] / 1e8, rel=1e-4)
    assert "MFU" in output.err and "MBU" in output.err
