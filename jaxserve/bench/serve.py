"""`jaxserve bench serve`: how does a server behave under load?

Question: latency and throughput of any OpenAI-compatible server, as its clients see them. Method:
streamed requests of given token lengths, or from a file, arriving by a Poisson process (`--rate`)
or from a fixed number of clients (`--concurrency`); see `bench.load` for what the figures mean.
`--warmup` requests are sent before and not counted. A jaxserve server counts the FLOPs and bytes of
its steps in /metrics; given the limits of its machine, as `bench engine` measures them, they become
MFU and MBU.

Command: `python -m jaxserve bench serve --concurrency 200 --requests 200 --prompt-tokens 16
--output-tokens 32`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from jaxserve.bench import stats
from jaxserve.bench.load import Objectives, Run, report, run_closed, run_open, sender
from jaxserve.bench.sse import Target, post_stream
from jaxserve.bench.workload import Lengths, Request, read_requests, synthetic_requests
from jaxserve.errors import ConfigError


def main(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit status is 1 if any request was not answered whole.

    Raises:
        ConfigError: the address, the dataset or the server is no good.
    """
    try:
        target = Target.parse(arguments.url, arguments.api_key)
        model = arguments.model or asyncio.run(_served_model(target, arguments.timeout))
        requests = _requests(arguments, model)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    objectives = Objectives(
        ttft_ms=arguments.slo_ttft_ms, tpot_ms=arguments.slo_tpot_ms, e2e_ms=arguments.slo_e2e_ms
    )
    run, work = asyncio.run(_load(arguments, target, requests))
    record = {
        "benchmark": "serve",
        **stats.environment(),
        "url": arguments.url,
        "model": model,
        "rate": arguments.rate,
        "concurrency": None if arguments.rate else arguments.concurrency,
        "prompt_tokens": arguments.prompt_tokens if not arguments.dataset else arguments.dataset,
        "output_tokens": arguments.output_tokens,
        "seed": arguments.seed,
        "objectives": objectives,
        **report(run, objectives),
        **_utilisation(work, run.seconds, arguments),
    }
    print(_render(record), file=sys.stderr)
    print(stats.json_line(record))
    return 0 if record["whole"] == record["requests"] else 1


async def _served_model(target: Target, timeout_s: float) -> str:
    response = await post_stream(target, "/v1/models", b"", timeout_s=timeout_s, method="GET")
    if response.status != 200:
        reason = response.error or f"status {response.status}"
        raise ValueError(f"GET /v1/models of {target.host}:{target.port} failed: {reason}")
    return json.loads(response.body)["data"][0]["id"]


def _requests(arguments: argparse.Namespace, model: str) -> list[Request]:
    num_requests = arguments.warmup + arguments.requests
    output_tokens = Lengths.parse(arguments.output_tokens)
    if arguments.dataset:
        return read_requests(
            Path(arguments.dataset),
            num_requests=num_requests,
            model=model,
            max_tokens=output_tokens.high,
        )
    return synthetic_requests(
        num_requests=num_requests,
        model=model,
        prompt_tokens=Lengths.parse(arguments.prompt_tokens),
        output_tokens=output_tokens,
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
    )


async def _load(
    arguments: argparse.Namespace, target: Target, requests: list[Request]
) -> tuple[Run, dict[str, float]]:
    """The run, and the work that the server counted in it."""
    warmup, measured = requests[: arguments.warmup], requests[arguments.warmup :]
    if warmup:
        await run_closed(sender(target, arguments.timeout, lambda: None), warmup, len(warmup))
    done = 0

    def on_done() -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done}/{len(measured)} requests", end="", file=sys.stderr, flush=True)

    send = sender(target, arguments.timeout, on_done)
    before = await _counted_work(target, arguments.timeout)
    if arguments.rate:
        run = await run_open(send, measured, arguments.rate, arguments.seed)
    else:
        run = await run_closed(send, measured, arguments.concurrency)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    after = await _counted_work(target, arguments.timeout)
    return run, {name: after[name] - before[name] for name in before.keys() & after}


async def _counted_work(target: Target, timeout_s: float) -> dict[str, float]:
    """FLOPs and bytes of the server's steps so far; nothing where it does not tell."""
    response = await post_stream(target, "/metrics", b"", timeout_s=timeout_s, method="GET")
    names = {"jaxserve_step_flops_total": "flops", "jaxserve_step_bytes_total": "bytes"}
    pairs = (line.rpartition(b" ") for line in response.body.splitlines())
    return {
        names[name.decode()]: float(value)
        for name, _, value in pairs
        if response.status == 200 and name.decode(errors="replace") in names
    }


def _utilisation(
    work: dict[str, float], seconds: float, arguments: argparse.Namespace
) -> dict[str, float]:
    """Work a second, and its share of the limits that were given."""
    limits = {"flops": arguments.matmul_flops_per_s, "bytes": arguments.read_bytes_per_s}
    shares = {"flops": "mfu", "bytes": "mbu"}
    record = {}
    for name, amount in sorted(work.items()):
        record[f"{name}_per_s"] = amount / seconds
        if limits[name]:
            record[shares[name]] = amount / seconds / limits[name]
    return record


def _render(record: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{record[key][column]:.1f}" for column in ("mean", "p50", "p90", "p99", "max"))]
        for name, key in (
            ("TTFT", "ttft_ms"),
            ("TPOT", "tpot_ms"),
            ("ITL", "itl_ms"),
            ("end to end", "e2e_ms"),
        )
        if record[key]
    ]
    lines = [
        f"{record['whole']} of {record['requests']} requests whole, {record['truncated']} truncated"
        f", errors: {record['errors'] or 'none'}",
        f"{record['output_tokens_per_s']:.1f} output tokens/s, "
        f"{record['requests_per_s']:.2f} requests/s, "
        f"goodput {record['goodput_requests_per_s']:.2f} requests/s ({record['good_share']:.0%})",
        *(f"  {kind}: {detail}" for kind, detail in record["error_examples"].items()),
    ]
    if "flops_per_s" in record:
        lines.append(
            f"{record['flops_per_s'] / 1e9:.1f} GFLOP/s, {record['bytes_per_s'] / 1e9:.2f} GB/s"
            + "".join(
                f", {key.upper()} {record[key]:.0%}" for key in ("mfu", "mbu") if key in record
            )
        )
    if rows:
        lines.append(stats.table(["ms", "mean", "p50", "p90", "p99", "max"], rows))
    return "\n".join(lines)
