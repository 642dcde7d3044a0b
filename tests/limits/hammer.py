"""One of several processes that reserve from the same buckets as fast as they can.

    python -m tests.limits.hammer redis URL PREFIX NUM      or      … owner SOCKET NUM

Requests of 1 to 200 tokens, under a limit of requests and one of tokens that hardly fill while it
runs; half of the processes use only a part of what they reserve. Prints the tokens and requests
that were let in and kept, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

from jaxserve.errors import RateLimited
from jaxserve.limits.limiter import Limiter
from jaxserve.limits.owner import OwnedStore
from jaxserve.limits.quota import Limits, Quota
from jaxserve.limits.redis_store import RedisStore
from jaxserve.limits.store import Store

LIMITS = Limits(
    requests_per_minute=60, burst_requests=900, tokens_per_minute=6000, burst_tokens=60_000
)
QUOTA = Quota(fixed=LIMITS.buckets("tenant", "acme"), tenant="acme")
CONCURRENT = 16


async def hammer(store: Store, num_requests: int, seed: int) -> dict[str, int]:
    """Sends them; returns what was let in."""
    rng = random.Random(seed)
    limiter = Limiter(store, lambda scope, kind: None, lambda reason: None)
    total = {"tokens": 0, "requests": 0, "refused": 0}
    left = iter(range(num_requests))

    async def client() -> None:
        for number in left:
            tokens, headers = rng.randint(1, 200), {}
            fingerprint = f"{seed}.{number}".encode()
            try:
                reservation = await limiter.reserve(
                    QUOTA, "", tokens, fingerprint, again=False, headers=headers
                )
            except RateLimited:
                total["refused"] += 1
                continue
            used = tokens if seed % 2 else rng.randint(tokens // 2, tokens)
            reservation.follow(lambda used=used: used)
            reservation.settle()
            total["requests"] += 1
            total["tokens"] += used

    await asyncio.gather(*(client() for _ in range(CONCURRENT)))
    await limiter.close()
    return total


def main() -> None:
    """See the module."""
    kind, *rest = sys.argv[1:]
    if kind == "redis":
        url, prefix, num, seed = rest
        store: Store = RedisStore(url, prefix=prefix, timeout_s=30)
    else:
        path, num, seed = rest
        store = OwnedStore(Path(path))
    print(json.dumps(asyncio.run(hammer(store, int(num), int(seed)))))


if __name__ == "__main__":
    main()
