"""The shared store against a real Redis: equal to the one in memory, exact, and there again."""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
import time

import pytest

from jaxserve.errors import ConfigError, Overloaded, RateLimited
from jaxserve.limits.bucket import Bucket
from jaxserve.limits.guard import GuardedStore
from jaxserve.limits.limiter import Limiter
from jaxserve.limits.quota import Limits, Quota
from jaxserve.limits.redis_store import RedisStore
from jaxserve.limits.store import Answer, LocalStore, MemoryStore, Take
from tests.limits.hammer import LIMITS
from tests.limits.redis_server import RedisServer

NUM_PROCESSES = 8
NUM_REQUESTS = 10_000
TIMEOUT_S = 120


def same(mine: Answer, theirs: Answer) -> bool:
    """Whether two answers say the same."""
    mine_numbers = [*mine.units, *mine.levels, mine.retry_after_s]
    their_numbers = [*theirs.units, *theirs.levels, theirs.retry_after_s]
    return (mine.granted, mine.culprit, mine.promised) == (
        theirs.granted,
        theirs.culprit,
        theirs.promised,
    ) and all(
        a == b or math.isclose(a, b, abs_tol=1e-6)
        for a, b in zip(mine_numbers, their_numbers, strict=True)
    )


async def compare(url: str, seed: int, num_events: int) -> int:
    """Random events in both stores; returns how many slots were promised."""
    rng = random.Random(seed)
    now_s = 1000.0
    memory = MemoryStore(lambda: now_s, lease_s=20)
    redis = RedisStore(url, prefix=f"equal {seed}", timeout_s=30, lease_s=20, clock_s=lambda: now_s)
    buckets = [
        Bucket(
            name=f"{number}",
            scope="key",
            kind=("requests", "tokens")[number % 2],
            rate=rng.choice([0.3, 1, 5.5, 100]),
            burst=rng.choice([5, 20, 300]),
        )
        for number in range(4)
    ]
    live: dict[str, Take] = {}
    num_promised = 0
    for number in range(num_events):
        now_s += 0.001 + (rng.choice([0, 0.1, 1, 1.5, 7, 30]) if number % 2 else rng.random())
        event = rng.random()
        if event < 0.6 or not live:
            own = tuple(rng.sample(buckets, rng.randint(1, 4)))
            shares = (1, 2, 0.4, 0.9, 1.1)
            units = tuple(
                1.0 if b.kind == "requests" else float(int(max(1, b.burst * rng.choice(shares))))
                for b in own
            )
            names = "".join(b.name for b in own)
            take = Take(
                id=f"i{number}",
                buckets=own,
                units=units,
                fingerprint=f"{names} {units} {rng.randrange(2)}".encode(),
                again=rng.random() < 0.1,
            )
            mine, theirs = memory.take(take), await redis.take(take)
            if mine.granted:
                live[take.id] = take
        else:
            take = live[rng.choice(list(live))]
            used = [float(rng.randrange(50)) for _ in take.units]
            if event < 0.85:
                memory.renew({take.id: used})
                await redis.renew({take.id: used})
                continue
            if event < 0.93:
                del live[take.id]
                memory.settle(take.id, used)
                await redis.settle(take.id, used)
                continue
            factor = rng.choice([0.5, 1, 1.5])
            changed = Take(
                id=take.id,
                buckets=take.buckets,
                units=tuple(
                    u * factor if b.kind == "tokens" else u
                    for b, u in zip(take.buckets, take.units, strict=True)
                ),
                fingerprint=take.fingerprint,
            )
            mine, theirs = memory.change(changed), await redis.change(changed)
            if not mine.granted:
                del live[take.id]
        assert same(mine, theirs), f"seed {seed}, event {number}: {mine} is not {theirs}"
        num_promised += mine.promised
    await redis.close()
    return num_promised


def test_both_stores_say_the_same(redis_server: RedisServer):
    promised = [asyncio.run(compare(redis_server.url, seed, 250)) for seed in range(12)]
    assert sum(promised) > 200


def run_processes(*arguments: str) -> list[dict[str, int]]:
    """The hammer in several processes at once."""
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.limits.hammer", *arguments),
                *(str(NUM_REQUESTS // NUM_PROCESSES), str(seed)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(NUM_PROCESSES)
    ]
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(output) for output in outputs]


def check_total(counts: list[dict[str, int]], seconds: float) -> None:
    """What all let in together is at most limit + burst, and not much less."""
    tokens = sum(count["tokens"] for count in counts)
    requests = sum(count["requests"] for count in counts)
    refused = sum(count["refused"] for count in counts)
    assert requests + refused == NUM_REQUESTS
    assert refused > NUM_REQUESTS / 4, "the limit was never reached"
    allowed = LIMITS.burst_requests + LIMITS.requests_per_minute / 60 * seconds
    assert requests <= allowed
    allowed = LIMITS.burst_tokens + LIMITS.tokens_per_minute / 60 * seconds
    assert 0.8 * LIMITS.burst_tokens <= tokens <= allowed


def test_eight_processes_on_one_redis_let_in_what_one_would(redis_server: RedisServer):
    start_s = time.monotonic()
    counts = run_processes("redis", redis_server.url, f"hammer {start_s}")
    check_total(counts, time.monotonic() - start_s)


def test_a_herd_that_comes_when_it_is_told_is_served(redis_server: RedisServer):
    async def herd() -> tuple[int, int]:
        store = RedisStore(redis_server.url, prefix="herd", timeout_s=30)
        limit = Bucket(name="herd", scope="key", kind="requests", rate=50, burst=10)
        refused = kept = 0

        async def client(number: int) -> None:
            nonlocal refused, kept
            for tries in range(2):
                answer = await store.take(
                    Take(
                        id=f"{number}.{tries}",
                        buckets=(limit,),
                        units=(1.0,),
                        fingerprint=f"{number}".encode(),
                    )
                )
                if answer.granted:
                    kept += tries
                    return
                refused += not tries
                await asyncio.sleep(math.ceil(answer.retry_after_s * 1000) / 1000)

        await asyncio.gather(*(client(number) for number in range(400)))
        await store.close()
        return refused, kept

    refused, kept = asyncio.run(herd())
    assert refused >= 300
    assert kept >= 0.99 * refused


def test_keys_expire_and_a_prefix_keeps_servers_apart(redis_server: RedisServer):
    async def run() -> None:
        limit = Bucket(name="one", scope="key", kind="tokens", rate=10, burst=100)
        take = Take(id="x", buckets=(limit,), units=(70.0,), fingerprint=b"f")
        for prefix in ("blue", "green"):
            store = RedisStore(redis_server.url, prefix=prefix, timeout_s=30)
            assert (await store.take(take)).granted
            names = [name async for name in store._client.scan_iter(f"{{{prefix}}}*")]
            ttls = {name: await store._client.pttl(name) for name in names}
            assert ttls.pop(f"{{{prefix}}}:leases".encode()) == -1
            assert len(ttls) == 2 and all(60_000 < ttl < 4_000_000 for ttl in ttls.values())
            await store.settle("x", [0.0])
            assert await store._client.zcard(f"{{{prefix}}}:leases") == 0
            await store.close()

    asyncio.run(run())


def test_many_leases_are_renewed_in_small_calls(redis_server: RedisServer):
    """One for thousands would take longer than a call may: the store would count as gone."""
    now_s = 1000.0
    limit = Bucket(name="many", scope="key", kind="tokens", rate=1, burst=10_000)
    sizes: list[int] = []

    async def run() -> None:
        nonlocal now_s
        store = RedisStore(
            redis_server.url, prefix="many", timeout_s=30, lease_s=20, clock_s=lambda: now_s
        )
        call = store._call

        async def counted(operation: str, arguments: dict) -> bytes:
            if operation == "renew":
                sizes.append(len(arguments["used"]))
            return await call(operation, arguments)

        store._call = counted
        for number in range(300):
            take = Take(id=f"{number}", buckets=(limit,), units=(10.0,), fingerprint=b"")
            assert (await store.take(take)).granted
        now_s += 15
        await store.renew({f"{number}": [2.0] for number in range(300)})
        now_s += 15  # the first leases are over
        probe = Take(id="probe", buckets=(limit,), units=(0.0,), fingerprint=b"")
        assert (await store.take(probe)).levels[0] == pytest.approx(10_000 - 3000 + 30)
        await store.close()

    asyncio.run(run())
    assert sum(sizes) == 300 and max(sizes) <= 128


async def until(condition, pause=0.02) -> None:
    """Waits for it, within bounds."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not await condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(pause)


@pytest.mark.parametrize("policy", ["open", "closed", "local"])
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_redis_that_goes_and_comes_back(tmp_path, policy, how):
    server = RedisServer(tmp_path)
    server.start()
    states: list[bool] = []
    hints: list[float | None] = []
    limits = Limits(tokens_per_minute=0.6, burst_tokens=100)  # hardly anything comes back
    quota = Quota(fixed=limits.buckets("tenant", "acme"), tenant="acme")

    async def run() -> None:
        shared = RedisStore(server.url, prefix="guard", timeout_s=0.2)
        store = GuardedStore(
            shared, LocalStore(), policy=policy, share=0.25, on_state=states.append
        )
        limiter = Limiter(store, lambda scope, kind: None, lambda reason: None)
        count = 0

        async def admits(tokens: int) -> bool:
            nonlocal count
            count += 1
            try:
                reservation = await limiter.reserve(
                    quota, "", tokens, b"%d" % count, again=False, headers={}
                )
            except RateLimited:
                return False
            except Overloaded as error:
                hints.append(error.retry_after_s)
                return False
            reservation.follow(lambda: tokens)
            reservation.settle()
            return True

        assert await admits(40)
        assert not await admits(90)  # promised, and abandoned
        getattr(server, how)()
        let_in = [await admits(10) for _ in range(5)]
        assert (
            let_in
            == {
                "open": [True] * 5,
                "closed": [False] * 5,
                "local": [True, True, False, False, False],  # a quarter of 100
            }[policy]
        )
        assert states == [False]
        assert hints == [2.0] * (5 if policy == "closed" else 0)
        if how == "kill":
            server.start()  # with nothing in it
        else:
            server.go_on()

        async def is_back() -> bool:
            await admits(1)
            return states == [False, True]

        await until(is_back)
        left = (await shared.take(_probe(quota))).levels[0]
        assert left < 100
        refused = [await admits(100) for _ in range(2)]
        assert refused == [False, False]  # the limit is the limit again
        await limiter.close()

    try:
        asyncio.run(run())
    finally:
        server.kill()


def _probe(quota: Quota) -> Take:
    return Take(id="probe", buckets=quota.fixed, units=(0.0,), fingerprint=b"probe")


@pytest.mark.parametrize("url", ["http://x", "redis://x:port", "nothing"])
def test_a_wrong_address_fails_at_start(url):
    with pytest.raises(ConfigError, match=r"limits\.redis_url"):
        RedisStore(url, prefix="x", timeout_s=1)
