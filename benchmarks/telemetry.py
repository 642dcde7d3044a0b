"""What does it cost to watch: traces, SLOs, costs, alerts, each on beside off, in the same run?

Question: by how much does throughput fall? The target is 1% at most with all of it on.

Method: for each part two whole servers (supervisor, fake engine, one HTTP worker, observer), the
same but for that part, get the same rounds of streams in turn; which goes first alternates. The
fake engine's steps take --step-ms, so that the event loop idles between them as in real life; with
0 nothing waits, and throughput is what the processors give. From each pair of rounds:

    serving    CPU time of engine and HTTP worker, all threads, by tokens that reached the client:
               what the part takes from those who serve
    observer   the same of the observer's process, which is another and less urgent
    tokens/s   by the clock; on a machine whose cores are all taken, the observer's share too

and from all pairs the ratio on / off of medians with its bootstrap 95% interval. The target is met
where the interval's bad end meets it; where the clock's interval is wider than the target, CPU time
decides (docs/performance.md).

    observer     records reach the observer's process, with the parts that are always there: SLOs
                 without objectives, incidents, the console
    tracing      of 10% of the requests, to a collector that takes them and answers
    slo          three objectives
    metering     priced, kept in a ledger
    alerts       baselines and detection, to a webhook
    vllm         vLLM's names in /metrics, which is scraped once a second in every arm
    everything   all of these

    python benchmarks/telemetry.py [PART ...] [--rounds 30] [--streams 64] [--tokens 64]
        [--step-ms 8] [--set key=value ...]

A part that this tree does not have is left out, and said. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the fakes are in tests/

from benchmarks.whole_server import WholeServer  # noqa: E402
from jaxserve.bench.stats import environment, json_line, median, ratio_interval, table  # noqa: E402
from jaxserve.errors import JaxserveError  # noqa: E402
from jaxserve.settings import load_config  # noqa: E402

#: What nobody watches; each part's settings come after these. What a tree lacks is left out.
OFF = (
    "telemetry.enabled=false",
    "telemetry.vllm_metrics=false",
    "tracing.endpoint=",
    "slo.objectives=",
    "metering.enabled=false",
    "alerts.degradation=false",
)
#: What switches each part on. SINK is the address of something that takes all and answers.
PARTS = {
    "observer": ("telemetry.enabled=true",),
    "tracing": (
        *("telemetry.enabled=true", "tracing.endpoint=http://SINK", "tracing.protocol=http"),
        *("tracing.sample_ratio=0.1",),
    ),
    "slo": (
        "telemetry.enabled=true",
        "slo.objectives=p99 ttft < 100 ms,p99 tpot < 20 ms,error_rate < 0.1%",
    ),
    "metering": (
        *("telemetry.enabled=true", "metering.enabled=true", "metering.hardware_per_hour=2.5"),
        *("metering.energy_per_kwh=0.15",),
    ),
    "alerts": (
        "telemetry.enabled=true",
        "alerts.degradation=true",
        "alerts.webhooks=http://SINK/alerts",
    ),
    "vllm": ("telemetry.vllm_metrics=true",),
}
#: What adds no part to the observer (SLOs are always there, with objectives or none): nothing is
#: missing where it names none for them.
PLAIN = ("observer", "slo", "vllm")
EVERYTHING = "everything"
#: The most by which throughput may fall.
TARGET = 0.01
SETTINGS = ("http.port=0", "model.max_context=2048", "scheduler.max_rows=64")


@dataclass(frozen=True)
class Cost:
    """One round of one server.

    Attributes:
        serving_us, observer_us: CPU time a token.
        tokens_per_s: by the clock.
    """

    serving_us: float
    observer_us: float
    tokens_per_s: float


async def stream(port: int, body: dict[str, Any]) -> int:
    """One stream on a connection of its own; the events that came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = msgspec.json.encode(body)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)
    )
    response = await reader.read()
    writer.close()
    assert b" 200 " in response[:20], response[:500]
    return response.count(b"data: {")


async def scrape(port: int) -> None:
    """As Prometheus does, more often than it would."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        await asyncio.sleep(1.0)


async def one_round(server: WholeServer, arguments: argparse.Namespace) -> Cost:
    """The same streams each time."""
    message = {"role": "user", "content": "hi there, fake. "}
    body = {
        "stream": True,
        "max_tokens": arguments.tokens,
        "messages": [message],
        "ignore_eos": True,
    }
    serving_s, observer_s = server.cpu_s()
    start_s = time.monotonic()
    scraping = asyncio.create_task(scrape(server.port))
    await asyncio.gather(
        *(stream(server.port, body | {"seed": seed}) for seed in range(arguments.streams))
    )
    took_s = time.monotonic() - start_s
    scraping.cancel()
    await asyncio.gather(scraping, return_exceptions=True)
    await asyncio.sleep(0.2)  # the last reports reach the observer
    after = server.cpu_s()
    num_tokens = arguments.streams * arguments.tokens
    return Cost(
        serving_us=(after[0] - serving_s) * 1e6 / num_tokens,
        observer_us=(after[1] - observer_s) * 1e6 / num_tokens,
        tokens_per_s=num_tokens / took_s,
    )


async def compare(
    off: WholeServer, on: WholeServer, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of one pair; what they say."""
    costs: dict[bool, list[Cost]] = {False: [], True: []}
    for number in range(arguments.rounds + 1):
        for is_on in (False, True) if number % 2 else (True, False):
            cost = await one_round(on if is_on else off, arguments)
            if number:  # the first warms up
                costs[is_on].append(cost)

    def of(is_on: bool, name: str) -> list[float]:
        return [getattr(cost, name) for cost in costs[is_on]]

    serving = ratio_interval(of(True, "serving_us"), of(False, "serving_us"))
    clock = ratio_interval(of(True, "tokens_per_s"), of(False, "tokens_per_s"))
    wide = clock[2] - clock[1] > TARGET
    return {
        "off_us_a_token": median(of(False, "serving_us")),
        "on_us_a_token": median(of(True, "serving_us")),
        "serving_ratio": serving,
        "observer_us_a_token": median(of(True, "observer_us")),
        "off_tokens_per_s": median(of(False, "tokens_per_s")),
        "on_tokens_per_s": median(of(True, "tokens_per_s")),
        "tokens_per_s_ratio": clock,
        "judged_by": "serving" if wide else "tokens_per_s",
        "meets_target": (serving[2] <= 1 + TARGET) if wide else (clock[1] >= 1 - TARGET),
    }


def known(settings: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Those settings that this tree has, and what it says of the others."""
    there, missing = [], []
    for setting in settings:
        try:
            load_config(settings=[setting], environ={})
        except JaxserveError as error:
            missing.append(error.message)
        else:
            there.append(setting)
    return tuple(there), missing


def settings_of(part: str, sink: str) -> tuple[str, ...]:
    """What switches a part on, the others off."""
    off, _ = known(OFF)
    parts = PARTS if part == EVERYTHING else {part: PARTS[part]}
    on: dict[str, None] = {}
    for settings in parts.values():
        there, _ = known(settings) if part == EVERYTHING else (settings, [])
        on |= dict.fromkeys(setting.replace("SINK", sink) for setting in there)
    return *off, *on


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts that were named."""
    record: dict[str, Any] = {
        "benchmark": "telemetry",
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "step_ms": arguments.step_ms,
        "rounds": arguments.rounds,
        "parts": {},
        "left_out": {},
    }
    rows = []
    extra = tuple(arguments.set)
    with taking_all() as sink, contextlib.ExitStack() as stack:
        off = WholeServer((*SETTINGS, *known(OFF)[0], *extra), arguments.step_ms)
        stack.callback(off.close)
        bare: set[str] = set()
        if any(part not in PLAIN for part in arguments.parts):
            with contextlib.closing(
                WholeServer((*SETTINGS, *settings_of("observer", sink), *extra), arguments.step_ms)
            ) as observer:
                bare = observer.parts()
        for part in arguments.parts:
            missing = known(PARTS[part])[1] if part != EVERYTHING else []
            if missing:
                record["left_out"][part] = missing[0]
                print(f"{part} is left out: {missing[0]}", flush=True)
                continue
            with contextlib.closing(
                WholeServer((*SETTINGS, *settings_of(part, sink), *extra), arguments.step_ms)
            ) as on:
                more = sorted(on.parts() - bare)
                if part not in (*PLAIN, EVERYTHING) and not more:
                    record["left_out"][part] = "no part of the observer does it in this tree"
                    print(f"{part} is left out: {record['left_out'][part]}", flush=True)
                    continue
                figures = asyncio.run(compare(off, on, arguments))
            record["parts"][part] = figures | {"observer_parts": more}
            rows.append(row(part, figures))
            print(" | ".join(rows[-1]), flush=True)
    header = ("part", "off µs", "on µs", "on / off", "observer µs", "tokens/s on / off", "≤ 1%")
    print("\n" + table(header, rows))
    return record | environment()


def row(part: str, figures: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""

    def interval(name: str) -> str:
        ratio, low, high = figures[name]
        return f"{ratio:.4f} [{low:.4f}, {high:.4f}]"

    return (
        part,
        f"{figures['off_us_a_token']:.1f}",
        f"{figures['on_us_a_token']:.1f}",
        interval("serving_ratio"),
        f"{figures['observer_us_a_token']:.2f}",
        interval("tokens_per_s_ratio"),
        ("yes" if figures["meets_target"] else "no") + f", by {figures['judged_by']}",
    )


@contextlib.contextmanager
def taking_all() -> Iterator[str]:
    """A process that answers every HTTP request with 200, and forgets it; its host and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, __file__, "--sink", str(listener.fileno())],
            pass_fds=[listener.fileno()],
        )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def take_all(listener: socket.socket) -> None:
    """The process behind `taking_all`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, sock=listener)
    await server.serve_forever()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="What watching costs those who serve.")
    names = [*PARTS, EVERYTHING]
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sink", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sink is not None:
        asyncio.run(take_all(socket.socket(fileno=arguments.sink)))
        return 0
    arguments.parts = arguments.parts or names
    unknown = [part for part in arguments.parts if part not in names]
    if unknown:
        parser.error(f"there is no part {unknown[0]}: there are {', '.join(names)}")
    print(json_line(run(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
