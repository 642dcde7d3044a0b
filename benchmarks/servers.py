"""How does the HTTP server behave under load, beside vLLM's CPU server?

Question: output tokens/s and time to first token of many concurrent streams, for both servers, on
the same weights. Method: both are started once and stay loaded, on a core set and threads of their
own choice; rounds alternate between them, each the same requests through `jaxserve bench serve`
(a process of its own), so that drift of a shared machine hits both alike. Reported: medians over
the rounds and the ratio with its bootstrap 95% interval.

    python benchmarks/servers.py --vllm-python PYTHON [--rounds 5] [--concurrency 200]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import embedded_gguf  # noqa: E402

from jaxserve.bench import stats  # noqa: E402

START_S = 900
OURS, THEIRS = "jaxserve", "vLLM float32"


class Server:
    """A server process on a port of its own."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [word.replace("PORT", port) for word in command],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.runs: list[dict[str, Any]] = []

    def await_ready(self, path: str) -> float:
        """Seconds from the start to the first 200 of `path`."""
        while time.monotonic() - self.started < START_S:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with status {self.process.returncode}")
            try:
                with urllib.request.urlopen(self.url + path, timeout=5):
                    return time.monotonic() - self.started
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise SystemExit(f"{self.name} is not ready after {START_S} s")

    def load(self, arguments: argparse.Namespace, seed: int) -> None:
        """One round of requests."""
        command = [
            *(sys.executable, "-m", "jaxserve.bench.cli", "serve", "--url", self.url),
            *("--requests", str(arguments.requests), "--concurrency", str(arguments.concurrency)),
            *("--prompt-tokens", str(arguments.prompt_tokens)),
            *("--output-tokens", str(arguments.output_tokens), "--seed", str(seed)),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=False)
        self.runs.append(json.loads(done.stdout.splitlines()[-1]))

    def median(self, *path: str) -> float:
        """Of one figure over the rounds."""
        values = []
        for run in self.runs:
            value: Any = run
            for key in path:
                value = value[key]
            values.append(value)
        return stats.median(values)


def main() -> int:
    """Runs it all; returns the exit status."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="servers-") as folder:
        servers = []
        try:
            for server, path in start(arguments, folder):
                servers.append(server)
                seconds = server.await_ready(path)
                print(f"{server.name} is ready after {seconds:.0f} s", file=sys.stderr)
            for server in servers:
                server.load(arguments, seed=1000)  # not counted
                server.runs.clear()
            for number in range(arguments.rounds):
                for server in servers if number % 2 == 0 else reversed(servers):
                    server.load(arguments, seed=number)
        finally:
            for server in servers:
                server.process.terminate()
                server.process.wait(timeout=120)
    report(arguments, servers)
    return 0


def start(arguments: argparse.Namespace, folder: str):
    """Starts the servers, one after the other."""
    rows = str(arguments.rows)
    ours = [sys.executable, "-m", "jaxserve", "serve", "--port", "PORT"]
    ours += ["--set", f"scheduler.max_rows={rows}"]
    for setting in arguments.set:
        ours += ["--set", setting]
    yield Server(OURS, ours, {"PYTHONPATH": str(ROOT)}), "/ready"
    if not arguments.vllm_python:
        print("left out: vLLM, no --vllm-python", file=sys.stderr)
        return
    worker = ROOT / "benchmarks" / "peer_workers" / "save_dense.py"
    subprocess.run(
        [arguments.vllm_python, str(worker), str(embedded_gguf()), folder],
        check=True,
        stdout=sys.stderr,
    )
    theirs = [arguments.vllm_python, "-m", "vllm.entrypoints.openai.api_server"]
    theirs += ["--model", folder, "--port", "PORT", "--dtype", "float32", "--max-num-seqs", rows]
    theirs += ["--max-model-len", "2048", "--no-enable-prefix-caching", "--host", "127.0.0.1"]
    yield Server(THEIRS, theirs, {"VLLM_CPU_KVCACHE_SPACE": "2"}), "/health"


def report(arguments: argparse.Namespace, servers: list[Server]) -> None:
    """The table on stdout, then the JSON line."""
    header = ["server", "whole", "output tokens/s", "TTFT p50 s", "TTFT p99 s", "TPOT p50 ms"]
    rows = [
        [
            server.name,
            f"{sum(run['whole'] for run in server.runs)} of "
            f"{sum(run['requests'] for run in server.runs)}",
            f"{server.median('output_tokens_per_s'):.0f}",
            f"{server.median('ttft_ms', 'p50') / 1e3:.2f}",
            f"{server.median('ttft_ms', 'p99') / 1e3:.2f}",
            f"{server.median('tpot_ms', 'p50'):.0f}",
        ]
        for server in servers
    ]
    print(stats.table(header, rows))
    record: dict[str, Any] = {"benchmark": "servers", **stats.environment(), **vars(arguments)}
    record["servers"] = {server.name: server.runs for server in servers}
    if len(servers) > 1:
        ours, theirs = ([run["output_tokens_per_s"] for run in s.runs] for s in servers)
        ratio, low, high = stats.ratio_interval(ours, theirs)
        print(f"\n{OURS} / {THEIRS}: {ratio:.2f} ({low:.2f} to {high:.2f})")
        record["ratio"] = [ratio, low, high]
    print(stats.json_line(record))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Two servers under the same load, in turn.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="sequences that run at once")
    parser.add_argument("--vllm-python", default="")
    parser.add_argument(
        "--set", action="append", default=[], help="a setting of this engine: section.key=value"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
