"""What does a rate limit cost a request?

Question: microseconds to reserve, and to reserve and settle, from each store, one request at a
time; and of a refusal when a bucket has promised its next 10 minutes, the most work a store can
have. Method: warm-up, then `--rounds` requests under four buckets (two of requests, two of tokens);
median and 99th percentile. The Redis is one that this script starts, where there is one; beside it
the time of a PING, the least that any question can take.

    python benchmarks/limits.py [--rounds 2000]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxserve.limits.owner import OwnedStore  # noqa: E402
from jaxserve.limits.quota import Limits, Quota  # noqa: E402
from jaxserve.limits.redis_store import RedisStore  # noqa: E402
from jaxserve.limits.store import LocalStore, Store, Take  # noqa: E402

WIDE = Limits(requests_per_minute=10**9, tokens_per_minute=10**12)
NARROW = Limits(requests_per_minute=600, burst_requests=10, tokens_per_minute=10**9)
OWNER = """
import asyncio, sys
from pathlib import Path
from jaxserve.limits.owner import Owner

async def main():
    await Owner(Path(sys.argv[1])).start()
    print("listens", flush=True)
    await asyncio.sleep(1e6)

asyncio.run(main())
"""


def take(limits: Limits, number: int) -> Take:
    """A request of 100 tokens."""
    quota = Quota(fixed=limits.buckets("key", "k") + limits.buckets("tenant", "t"))
    units = tuple(1.0 if bucket.kind == "requests" else 100.0 for bucket in quota.fixed)
    return Take(
        id=f"{limits.requests_per_minute:g} {number}",
        buckets=quota.fixed,
        units=units,
        fingerprint=b"%d" % number,
    )


async def timed(call: Callable[[int], Awaitable[object]], rounds: int) -> dict[str, float]:
    """Median and 99th percentile, in microseconds."""
    for number in range(rounds // 10):
        await call(-number - 1)
    times = []
    for number in range(rounds):
        start_ns = time.perf_counter_ns()
        await call(number)
        times.append((time.perf_counter_ns() - start_ns) / 1e3)
    times.sort()
    return {"p50_us": round(times[rounds // 2], 1), "p99_us": round(times[rounds * 99 // 100], 1)}


async def measure(name: str, store: Store, rounds: int) -> dict[str, dict[str, float]]:
    """All figures of one store."""

    async def reserve(number: int) -> None:
        assert (await store.take(take(WIDE, number))).granted

    async def whole(number: int) -> None:
        request = take(WIDE, number + 10 * rounds)
        await store.take(request)
        await store.settle(request.id, [1.0, 50.0, 1.0, 50.0])

    async def refusal(number: int) -> None:
        # Now and then one is let in: of those that are promised slots here, none comes.
        await store.take(take(NARROW, number + 20 * rounds))

    results = {
        "reserve": await timed(reserve, rounds),
        "reserve and settle": await timed(whole, rounds),
    }
    for number in range(6200):  # 10 at once, 6000 in 10 minutes, and some more
        await store.take(take(NARROW, 10**6 + number))
    results["refusal, all promised"] = await timed(refusal, rounds)
    for what, figures in results.items():
        print(f"{name:8} {what:24} {figures['p50_us']:8.1f} {figures['p99_us']:8.1f}", flush=True)
    await store.close()
    return results


async def run(rounds: int) -> dict[str, object]:
    """All stores."""
    results: dict[str, object] = {"memory": await measure("memory", LocalStore(), rounds)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "limits")
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert owner.stdout is not None and owner.stdout.readline()
        results["owner"] = await measure("owner", OwnedStore(path), rounds)
        owner.kill()
        owner.communicate()
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            print("no redis-server here: left out")
            return results
        path = Path(folder, "redis")
        server = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(path), "--save", ""],
            stdout=subprocess.DEVNULL,
        )
        while not path.exists():
            await asyncio.sleep(0.01)
        store = RedisStore(f"unix://{path}", prefix="benchmark", timeout_s=30)
        results["ping"] = ping = await timed(lambda _: store._client.ping(), rounds)
        print(f"{'redis':8} {'ping':24} {ping['p50_us']:8.1f} {ping['p99_us']:8.1f}")
        results["redis"] = await measure("redis", store, rounds)
        server.kill()
        server.wait()
    return results


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000)
    arguments = parser.parse_args()
    print(f"{'store':8} {'what':24} {'p50 us':>8} {'p99 us':>8}")
    print(json.dumps({"benchmark": "limits", **asyncio.run(run(arguments.rounds))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
