"""What does counting cost, and what does a scrape?

Method: the very calls that an HTTP worker makes, in a loop, after a warm-up; the median of --rounds
rounds of 1,000 calls (of scrapes, 20). Requests come from as many tenants and adapters as have
labels, so that the page is as large as it gets:

    token      a choice's next token comes
    request    what is counted at a request's end
    step       a device call
    report     what a worker's report to the observer takes of a request, and of a step
    scrape     the whole page, on the event loop: what streams wait for at most

Beside them, the share of what a token costs the HTTP worker (--token-us, from
benchmarks/http_server.py), for answers of --tokens tokens and steps of --rows rows.

    python benchmarks/metrics.py [--rounds 15] [--token-us 40] [--tokens 64] [--rows 64]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxserve.bench.stats import environment, json_line, median, percentile, table  # noqa: E402
from jaxserve.config import TelemetryConfig  # noqa: E402
from jaxserve.http.metrics import Metrics  # noqa: E402
from jaxserve.http.observer.messages import TO_OBSERVER, Report  # noqa: E402
from jaxserve.protocol.messages import SequenceRecord  # noqa: E402
from jaxserve.protocol.records import Asked, RequestRecord  # noqa: E402
from jaxserve.protocol.status import EngineStatus, StepStats  # noqa: E402
from jaxserve.types import DeviceInfo, ModelInfo  # noqa: E402

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def request(number: int) -> RequestRecord:
    """One of many tenants', every other with an adapter."""
    ms = 1_000_000
    return RequestRecord(
        request_id=f"{number:032x}",
        route=ROUTES[number % len(ROUTES)],
        model="tiny",
        adapter=f"adapter-{number % 20}" if number % 2 else "",
        tenant=f"tenant-{number % 60}",
        arrived_ns=10**9,
        admitted_ns=10**9 + ms,
        submitted_ns=10**9 + 2 * ms,
        first_token_ns=10**9 + 60 * ms,
        done_ns=10**9 + 900 * ms,
        status=200,
        decode_ns=800 * ms,
        decode_tokens=63,
        prompt_tokens=500,
        completion_tokens=64,
        cached_tokens=256,
        asked=Asked(max_tokens=100, temperature=0.7),
        finish_reasons=["stop"],
        sequences=[
            SequenceRecord(
                prompt_tokens=500,
                output_tokens=64,
                queued_ns=10**9 + 3 * ms,
                scheduled_ns=10**9 + 20 * ms,
                first_token_ns=10**9 + 59 * ms,
                done_ns=10**9 + 899 * ms,
            )
        ],
    )


def step(number: int) -> StepStats:
    """One device call."""
    hints = typing.get_type_hints(StepStats)
    values = {name: "" if kind is str else number for name, kind in hints.items()}
    return StepStats(**values | {"program": "decode_r64"})  # pyright: ignore[reportArgumentType]


def microseconds(call: Callable[[int], object], rounds: int, calls: int = 1000) -> list[float]:
    """CPU time of one call, in each round."""
    found = []
    for number in range(rounds + 1):
        start_ns = time.process_time_ns()
        for index in range(calls):
            call(index)
        if number:  # the first warms up
            found.append((time.process_time_ns() - start_ns) / 1e3 / calls)
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="What counting costs.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--token-us", type=float, default=40.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    model = ModelInfo(
        name="tiny", max_context=8192, vocab_size=8, eos_token_ids=(1,), cache_groups=()
    )
    device = DeviceInfo(kind="x", count=1, flops_per_s=1e12, bytes_per_s=1e11)
    status = EngineStatus(
        state="ready", pid=1, step_age_s=0, model=model, device=device, adapter_slots=8
    )
    tenants = [f"tenant-{number}" for number in range(60)]
    metrics = Metrics(lambda: status, config=TelemetryConfig(), tenants=tenants)
    requests, steps = [request(number) for number in range(1000)], [step(n) for n in range(1000)]

    def report(index: int) -> bytes:
        return TO_OBSERVER.encode(Report(worker=0, life="", number=1, ended=[requests[index]]))

    def report_step(index: int) -> bytes:
        return TO_OBSERVER.encode(Report(worker=0, life="", number=1, steps=[steps[index]]))

    rounds, tokens, rows = arguments.rounds, arguments.tokens, arguments.rows
    costs = {  # microseconds, and tokens that share them
        "token": (microseconds(lambda _: metrics.tokens(1, 0.02), rounds), 1),
        "request": (microseconds(lambda index: metrics.ended(requests[index]), rounds), tokens),
        "step": (microseconds(lambda index: metrics.step(steps[index]), rounds), rows),
        "report of a request": (microseconds(report, rounds), tokens),
        "report of a step": (microseconds(report_step, rounds), rows),
    }
    scrapes = microseconds(lambda _: metrics.render(), rounds, 20)
    lines = [
        (name, f"{median(found):.2f}", f"{median(found) / shared / arguments.token_us:.3%}")
        for name, (found, shared) in costs.items()
    ]
    page = metrics.render()
    print(table(("what", "µs", f"of {arguments.token_us:g} µs a token"), lines))
    print(f"a scrape of {page.count(b'\n')} lines: {median(scrapes) / 1e3:.2f} ms")
    record: dict[str, typing.Any] = {name: median(found) for name, (found, _) in costs.items()}
    record["share"] = sum(
        median(found) / shared / arguments.token_us for found, shared in costs.values()
    )
    record["scrape"] = {"us": median(scrapes), "p99_us": percentile(scrapes, 99)}
    record["scrape"] |= {"lines": page.count(b"\n"), "bytes": len(page)}
    print(json_line({"benchmark": "metrics", "us": record} | environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
