"""5,000 requests at once with all that watches switched on: nothing is lost or counted twice.

As configs/production.yaml has it, but for the model, TLS, keys and addresses.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.fakes.alert_receiver import AlertReceiver
from tests.fakes.otlp import grpc_receiver
from tests.http.test_serve import TIMEOUT_S, address_of, children, started, wait_ready
from tests.http.test_tracing_serve import wait_for

ROOT = Path(__file__).resolve().parents[2]
NUM_REQUESTS = 5_000
NUM_TOKENS = 3
#: Every so many requests of the flood is refused for its own fault, and streams another.
REFUSED_EACH, STREAMED_EACH = 50, 2
RATIO = 0.1


def production(*more: str) -> list[str]:
    """Its sections of what watches, as settings."""
    document = yaml.safe_load((ROOT / "configs" / "production.yaml").read_text())
    settings = []
    for section in ("tracing", "slo", "metering", "alerts"):
        for key, value in document[section].items():
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            settings.append(f"{section}.{key}={text}")
    return [*settings, *more]


@contextmanager
def many_files() -> Iterator[None]:
    """As many as the system allows, here and in processes that are started."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NUM_REQUESTS + 500:
        pytest.skip(f"a process may have {hard} files open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (NUM_REQUESTS + 500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def flood(port: int) -> Counter[int]:
    """All connections first, then all requests; how often each status was answered."""
    all_connected = asyncio.Event()
    num_connected = 0

    async def client(number: int) -> int:
        nonlocal num_connected
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        num_connected += 1
        if num_connected == NUM_REQUESTS:
            all_connected.set()
        await all_connected.wait()
        asked: dict[str, object] = {"prompt": f"{number}", "max_tokens": NUM_TOKENS}
        asked |= {"ignore_eos": True, "stream": number % STREAMED_EACH == 0}
        if number % REFUSED_EACH == 1:
            asked["temperature"] = -1
        body = json.dumps(asked).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        answer = await reader.read()
        writer.close()
        status = int(answer.split(b" ", 2)[1])
        if status == 200 and asked["stream"]:
            assert answer.rstrip().endswith((b"data: [DONE]", b"\r\n0")), answer[-200:]
        return status

    return Counter(await asyncio.gather(*map(client, range(NUM_REQUESTS))))


@pytest.mark.slow
def test_5000_requests_at_once_are_all_seen_priced_and_told(tmp_path: Path) -> None:
    with (
        many_files(),
        grpc_receiver() as collector,
        AlertReceiver() as alerts,
        started(
            *production(
                f"tracing.endpoint={collector.endpoint}",
                f"tracing.sample_ratio={RATIO}",
                *("tracing.slow_ms=0", "tracing.slow_ttft_ms=0"),  # as sampled, and no others
                f"alerts.webhooks={alerts.url}/alerts",
                f"telemetry.state_dir={tmp_path}",
                *("http.workers=2", "scheduler.max_waiting=8192"),
            )
        ) as process,
    ):
        base = address_of(process)
        wait_ready(base)
        for pid in children(process.pid):  # as many files as they may, whatever they were given
            limits = Path(f"/proc/{pid}/limits").read_text()
            (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
            assert line.split()[3] == line.split()[4]
        start_s = time.monotonic()
        statuses = asyncio.run(flood(int(base.rpartition(":")[2])))
        took_s = time.monotonic() - start_s
        seen = wait_for(
            base,
            lambda found: (
                found.get("jaxserve_cost_entries_total") == NUM_REQUESTS
                and not found["jaxserve_spans_waiting"]
            ),
        )
        slo = httpx.get(f"{base}/slo", timeout=TIMEOUT_S).json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        log = process.stderr.read()
        spans = list(collector.spans)
    print(f"\n{NUM_REQUESTS} requests in {took_s:.1f} s, {len(spans)} spans")
    refused = NUM_REQUESTS // REFUSED_EACH
    assert statuses == {200: NUM_REQUESTS - refused, 400: refused}
    # Nothing was lost on the way, at any of its stations.
    assert seen["jaxserve_observer_requests_total"] == NUM_REQUESTS
    assert seen["jaxserve_observer_dropped_total"] == 0
    assert seen["jaxserve_cost_entries_lost_total"] == 0
    assert {k: v for k, v in seen.items() if k.startswith("jaxserve_spans_dropped") and v} == {}
    assert {k: v for k, v in seen.items() if k.startswith("jaxserve_observer_faults") and v} == {}
    assert "Traceback" not in log
    # The ledger has each once, and all their tokens.
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger:
        sql = "SELECT COUNT(*), COUNT(DISTINCT request_id), SUM(completion_tokens) FROM requests"
        assert ledger.execute(sql).fetchone() == (
            *(NUM_REQUESTS, NUM_REQUESTS),
            NUM_TOKENS * (NUM_REQUESTS - refused),
        )
    # Traces: those that their ids choose, whole.
    roots = [span for span in spans if span.kind == 2]
    assert len({span.trace_id for span in roots}) == len(roots)
    assert {span.trace_id for span in spans} == {span.trace_id for span in roots}
    kept = 'jaxserve_traces_kept_total{reason="sampled"}'
    assert len(roots) == seen[kept]
    spread = (NUM_REQUESTS * RATIO * (1 - RATIO)) ** 0.5
    assert abs(len(roots) - RATIO * NUM_REQUESTS) < 5 * spread
    # Objectives: every answered request is judged, refused ones are nobody's fault.
    (availability,) = [o for o in slo["objectives"] if o["kind"] == "availability"]
    assert (availability["good"], availability["bad"]) == (NUM_REQUESTS - refused, 0)
    assert availability["not_counted"]["refused"] == refused
