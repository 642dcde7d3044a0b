"""Traces of a whole server, through a proxy in front of it, at a real collector."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import time
from collections import defaultdict

import httpx
import pytest

from tests.fakes.http_wire import Message, forwarding_proxy, read_message
from tests.fakes.otlp import RECEIVERS, Seen, grpc_receiver
from tests.http.test_serve import (
    HI,
    TIMEOUT_S,
    address_of,
    children,
    command,
    started,
    wait_gone,
    wait_ready,
)

PATH = "/v1/completions"


def settings(endpoint: str, *more: str) -> tuple[str, ...]:
    """Of a server that traces there."""
    return (f"tracing.endpoint={endpoint}", "telemetry.report_interval_s=0.05", *more)


def values_of(base: str) -> dict[str, float]:
    """The server's metrics."""
    lines = httpx.get(f"{base}/metrics", timeout=TIMEOUT_S).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def wait_for(base: str, condition) -> dict[str, float]:
    """The metrics, once they are so; an observer that is busy leaves its own out."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        found = values_of(base)
        if "jaxserve_spans_waiting" in found and condition(found):
            return found
        assert time.monotonic() < deadline_s, found


@pytest.mark.slow
def test_of_10000_requests_500_at_a_time_none_is_mixed() -> None:
    num_requests, at_a_time = 10_000, 500
    with (
        grpc_receiver() as receiver,
        started(
            *settings(receiver.endpoint, "tracing.max_spans=1000000", "http.workers=2"),
            *("scheduler.decode_steps=1", "tracing.sample_ratio=0"),
        ) as process,
    ):
        base = address_of(process)
        wait_ready(base)
        engine = next(p for p in children(process.pid) if "fakes.engine" in command(p))
        proxied: dict[str, str] = {}  # by trace, the proxy's span
        answered = asyncio.run(
            storm(int(base.rpartition(":")[2]), num_requests, at_a_time, proxied)
        )
        assert len(answered) == num_requests
        spans = receiver.wait_for(8 * num_requests, timeout_s=120)
        metrics = wait_for(
            base, lambda found: not found["jaxserve_spans_waiting"] and found[KEPT] == num_requests
        )
        spans = list(receiver.spans)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    assert metrics["jaxserve_spans_sent_total"] == len(spans)
    assert not metrics['jaxserve_spans_dropped_total{reason="full"}']
    by_trace: dict[str, list[Seen]] = defaultdict(list)
    for span in spans:
        by_trace[span.trace_id].append(span)
    assert by_trace.keys() == answered.keys() == proxied.keys()
    for trace_id, own in by_trace.items():
        check_whole(own, proxied[trace_id], engine)
        (root,) = [span for span in own if span.kind == 2]
        assert answered[trace_id] == (root.span_id, root.attributes["jaxserve.request_id"])


KEPT = 'jaxserve_traces_kept_total{reason="sampled"}'


def check_whole(spans: list[Seen], parent_id: str, engine: int) -> None:
    """One request's spans, of both processes, and of no other request."""
    (root,) = [span for span in spans if span.kind == 2]
    assert root.parent_id == parent_id
    names = sorted(span.name for span in spans)
    assert root.name.startswith("text_completion ")
    assert set(names) <= {root.name} | {
        *("receive", "admit", "tokenize", "submit"),
        *("queue", "prefill", "decode", "detokenize"),
    }
    assert len(names) == len(set(names)) >= 8
    for span in spans:
        in_engine = span.name in ("queue", "prefill", "decode")
        assert span.resource["jaxserve.process"] == ("engine" if in_engine else "http")
        assert span.resource.get("process.pid") == (engine if in_engine else None)
        assert span is root or span.parent_id == root.span_id
        assert root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns


async def storm(
    port: int, num_requests: int, at_a_time: int, proxied: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """Asks through a proxy; by trace, the span and the request that the answer's headers name.

    Args:
        proxied: is given the proxy's span of each trace.
    """
    numbers = iter(range(num_requests))
    answered: dict[str, tuple[str, str]] = {}

    def rewrite(headers: dict[str, str]) -> None:
        version, trace_id, _, flags = headers.pop("traceparent").split("-")
        proxied[trace_id] = secrets.token_hex(8)
        headers["TRACEPARENT"] = f"{version}-{trace_id}-{proxied[trace_id]}-{flags}"

    async def client(proxy: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
        for number in numbers:
            trace_id = secrets.token_hex(16)
            asked = {"prompt": f"{number}", "max_tokens": 2, "ignore_eos": True}
            headers = {"host": "x", "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
            body = json.dumps(asked).encode()
            headers |= {"content-length": f"{len(body)}", "content-type": "application/json"}
            writer.write(Message(f"POST {PATH} HTTP/1.1", headers, body).encode())
            response = await read_message(reader)
            assert " 200 " in response.first, response.body
            _, told, span_id, _ = response.headers["traceparent"].split("-")
            assert told == trace_id
            answered[trace_id] = span_id, response.headers["x-request-id"]
        writer.close()

    async with forwarding_proxy(port, rewrite) as proxy, asyncio.TaskGroup() as group:
        for _ in range(at_a_time):
            group.create_task(client(proxy))
    return answered


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_collector_that_is_dead_slow_or_back_changes_no_answer(protocol: str) -> None:
    with RECEIVERS[protocol]() as receiver:
        more = (f"tracing.protocol={protocol}", "tracing.timeout_s=0.5", "tracing.max_spans=100")
        ask = {"messages": HI, "max_tokens": 2, "seed": 1}
        with started(*settings(receiver.endpoint, "tracing.sample_ratio=1", *more)) as process:
            base = address_of(process)
            wait_ready(base)
            with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
                first = client.post("/v1/chat/completions", json=ask)
                receiver.wait_for(8)
                receiver.refuses = True
                for _ in range(40):
                    again = client.post("/v1/chat/completions", json=ask)
                    assert again.json()["choices"] == first.json()["choices"]
                dropped = 'jaxserve_spans_dropped_total{reason="full"}'
                found = wait_for(base, lambda found: found[dropped] > 0)
                assert found["jaxserve_spans_waiting"] <= 100
                receiver.refuses = False
                receiver.open.clear()  # it holds what it is sent
                for _ in range(20):
                    again = client.post("/v1/chat/completions", json=ask)
                    assert again.json()["choices"] == first.json()["choices"]
                receiver.open.set()
                wait_for(base, lambda found: not found["jaxserve_spans_waiting"])
                last = client.post("/v1/chat/completions", json=ask)
                trace_id = last.headers["traceparent"].split("-")[1]
                found = wait_for(base, lambda found: found[KEPT] == 62)
                found = wait_for(base, lambda found: not found["jaxserve_spans_waiting"])
            assert trace_id in {span.trace_id for span in receiver.spans}
            # Each of the requests had 8 or 9 spans, and each is sent or counted as dropped.
            dropped = sum(n for name, n in found.items() if "spans_dropped_total" in name)
            assert 62 * 8 <= found["jaxserve_spans_sent_total"] + dropped <= 62 * 9
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0


@pytest.mark.slow
def test_what_is_not_sampled_is_kept_where_it_fails_and_the_engine_s_death_is_told() -> None:
    with grpc_receiver() as receiver:
        more = ("tracing.sample_ratio=0", "model.max_context=3000", "engine.restart_backoff_s=0")
        with started(*settings(receiver.endpoint, *more)) as process:
            base = address_of(process)
            wait_ready(base)
            ask = {"prompt": "hi", "ignore_eos": True, "max_tokens": 1500, "seed": 1}
            with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
                client.post(PATH, json=ask | {"max_tokens": 2})  # goes well: not kept
                late = client.post(PATH, json=ask | {"timeout": 0.05, "max_tokens": 2900})
                assert late.status_code >= 500
                (root,) = [s for s in receiver.wait_for(6) if s.kind == 2]
                assert root.attributes["jaxserve.kept"] == "failed" and root.status == 2
                assert root.attributes["jaxserve.outcome"] == "expired"
                assert root.trace_id == late.headers["x-request-id"]
                receiver.spans.clear()
                sampled = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
                with client.stream("POST", PATH, json=ask | {"stream": True}, headers=sampled) as s:
                    lines = s.iter_lines()
                    next(lines)
                    engine = next(p for p in children(process.pid) if "fakes.engine" in command(p))
                    watch = os.pidfd_open(engine)
                    os.kill(engine, signal.SIGKILL)
                    wait_gone(watch)
                    assert list(lines)[-2:] == ["data: [DONE]", ""]
                spans = {span.name: span for span in receiver.wait_for(8)}
            assert "replay" in spans
            replay, decode = spans["replay"], spans["decode"]
            assert replay.parent_id == decode.span_id
            assert decode.start_ns <= replay.start_ns < replay.end_ns <= decode.end_ns
            assert {span.trace_id for span in spans.values()} == {"a" * 32}
            assert decode.resource["process.pid"] not in (engine, 0)  # the one that ended it
