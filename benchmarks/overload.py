"""Does a server that is asked for three times what it can do still do what it can?

Question: goodput (output of requests answered whole within their deadline) at 3 times the capacity,
against the peak at 1 time; and the share of those let in that meet their deadline. Method: the
capacity is what a closed loop of clients gets through; then requests arrive by a Poisson process at
each multiple of it, every request with the same `timeout`; refused ones do not come again. Between
the loads the server empties. By default over the fake engine at a fixed pace (so that the load
generator and the engine do not take each other's processor), with `--url` over any server.

    python benchmarks/overload.py [--multiples 1,2,3] [--seconds 30] [--timeout 3] [--off]
    python benchmarks/overload.py --url http://127.0.0.1:8000 --prompt-tokens 32 --timeout 20

`--off` sends the timeouts in a way in which the server does not know them, so that it refuses
nothing: what happens without admission. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxserve.bench.sse import Response, Target, post_stream  # noqa: E402
from jaxserve.bench.workload import poisson_arrivals  # noqa: E402

PATH = "/v1/completions"
ROWS = 16
FAKE = {"FAKE_STEP_MS": "25", "FAKE_PREFILL_TOKEN_US": "200"}
SETTINGS = (
    f"scheduler.max_rows={ROWS}",
    "scheduler.decode_steps=1",
    "scheduler.max_step_tokens=64",
)


@dataclass(kw_only=True)
class Load:
    """What came of one load.

    Attributes:
        good, late, refused, failed: answers that came whole in time, that were let in and not in
            time, that were refused at once, and all others.
        end_s: when the load ends; what is answered later is no goodput of it.
        good_tokens, good_in_time: output tokens and number of good answers until then; longer
            requests are refused first, so their number alone would flatter.
        refusal_ms: of each refusal.
    """

    multiple: float
    seconds: float
    good: int = 0
    late: int = 0
    refused: int = 0
    failed: int = 0
    end_s: float = 0.0
    good_tokens: int = 0
    good_in_time: int = 0
    refusal_ms: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Output tokens of good requests a second."""
        return self.good_tokens / self.seconds

    @property
    def met(self) -> float:
        """Share of those let in that met the deadline."""
        let_in = self.good + self.late
        return self.good / let_in if let_in else 0.0

    def summary(self) -> dict[str, float]:
        """For people and for the JSON line."""
        refusals = sorted(self.refusal_ms)
        return {
            "multiple": self.multiple,
            "goodput_rps": round(self.good_in_time / self.seconds, 2),
            "goodput_tokens_per_s": round(self.goodput, 1),
            "met_deadline": round(self.met, 4),
            "good": self.good,
            "late": self.late,
            "refused": self.refused,
            "failed": self.failed,
            "refusal_p50_ms": round(refusals[len(refusals) // 2], 2) if refusals else 0.0,
        }


class Client:
    """Sends requests of random lengths with one deadline.

    Args:
        knows: whether the server is told the deadline.
    """

    def __init__(self, target: Target, arguments: argparse.Namespace) -> None:
        self._target = target
        self._arguments = arguments
        self._random = random.Random(arguments.seed)

    def body(self) -> bytes:
        """A request."""
        low, high = self._arguments.output_tokens
        fields = {
            "prompt": [
                self._random.randrange(256, 500) for _ in range(self._arguments.prompt_tokens)
            ],
            "max_tokens": self._random.randint(low, high),
            "ignore_eos": True,
            "stream": True,
        }
        if not self._arguments.off:
            fields["timeout"] = self._arguments.timeout
        return json.dumps(fields).encode()

    async def send(self, load: Load) -> None:
        """One request, counted."""
        started_s = time.monotonic()
        answer = await post_stream(
            self._target, PATH, self.body(), timeout_s=10 * self._arguments.timeout
        )
        self._count(load, answer, time.monotonic() - started_s)

    def _count(self, load: Load, answer: Response, took_s: float) -> None:
        whole = answer.status == 200 and bool(answer.events) and answer.events[-1][1] == b"[DONE]"
        if whole and took_s <= self._arguments.timeout:
            load.good += 1
            if time.monotonic() <= load.end_s:
                load.good_in_time += 1
                load.good_tokens += len(answer.events) - 1
        elif answer.status == 503:
            load.refused += 1
            load.refusal_ms.append(took_s * 1e3)
        elif answer.status in (200, 504):
            load.late += 1
        else:
            load.failed += 1


async def capacity(client: Client, concurrency: int, seconds: float) -> float:
    """Requests a second that a closed loop gets through."""
    load = Load(multiple=0, seconds=seconds, end_s=time.monotonic() + seconds)

    async def loop() -> None:
        while time.monotonic() < load.end_s:
            await client.send(load)

    await asyncio.gather(*(loop() for _ in range(concurrency)))
    return load.good_in_time / load.seconds


async def offer(client: Client, multiple: float, rate: float, seconds: float) -> Load:
    """An open load of so many requests a second."""
    start_s = time.monotonic()
    load = Load(multiple=multiple, seconds=seconds, end_s=start_s + seconds)
    tasks = []
    for at_s in poisson_arrivals(rate, seed=int(multiple * 1000)):
        if at_s > seconds:
            break
        await asyncio.sleep(max(0.0, start_s + at_s - time.monotonic()))
        tasks.append(asyncio.create_task(client.send(load)))
    await asyncio.gather(*tasks)
    return load


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, object]:
    """All loads against one server."""
    client = Client(Target.parse(url), arguments)
    await capacity(client, arguments.concurrency, arguments.seconds / 3)  # warm-up
    rate = await capacity(client, arguments.concurrency, arguments.seconds)
    print(f"capacity: {rate:.1f} requests a second", flush=True)
    loads = []
    for multiple in arguments.multiples:
        load = await offer(client, multiple, multiple * rate, arguments.seconds)
        print(json.dumps(load.summary()), flush=True)
        loads.append(load)
        await asyncio.sleep(2 * arguments.timeout)
    ratio = loads[-1].goodput / max(load.goodput for load in loads)
    first = loads[-1].goodput / loads[0].goodput
    return {
        "benchmark": "overload",
        "capacity_rps": round(rate, 2),
        "timeout_s": arguments.timeout,
        "admission": not arguments.off,
        "loads": [load.summary() for load in loads],
        "goodput_last_over_first": round(first, 3),
        "goodput_last_over_peak": round(ratio, 3),
    }


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="")
    parser.add_argument(
        "--multiples", type=lambda t: [float(m) for m in t.split(",")], default=[1, 3]
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--timeout", type=float, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument(
        "--output-tokens", type=lambda t: [int(n) for n in t.split(":")], default=[10, 50]
    )
    parser.add_argument("--concurrency", type=int, default=2 * ROWS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--off", action="store_true", help="the server is not told the deadlines")
    arguments = parser.parse_args()
    if arguments.url:
        print(json.dumps(asyncio.run(measure(arguments.url, arguments))))
        return 0
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.fakes.serve", "engine=tests.fakes.paced_engine"),
            *("http.port=0", *SETTINGS),
        ],
        cwd=ROOT,
        env={**os.environ, **FAKE},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        print(json.dumps(asyncio.run(measure(url, arguments))))
    finally:
        server.terminate()
        server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
