"""What the policies let in while the shared store of the rate limits is gone."""

from __future__ import annotations

import asyncio

import pytest

from jaxserve.errors import Overloaded, TooLargeForLimit
from jaxserve.limits.guard import GuardedStore
from jaxserve.limits.limiter import Limiter
from jaxserve.limits.quota import Limits, Quota
from jaxserve.limits.store import Answer, LocalStore, StoreFailure, Take


class GoneStore:
    """A store that never answers."""

    async def take(self, take: Take) -> Answer:
        raise StoreFailure("gone")

    async def change(self, take: Take) -> Answer:
        raise StoreFailure("gone")

    async def renew(self, used: dict[str, list[float]]) -> None:
        raise StoreFailure("gone")

    async def settle(self, id: str, used: list[float]) -> None:
        raise StoreFailure("gone")

    async def close(self) -> None:
        pass


def ask(limits: Limits, *num_tokens: int, true_up: int | None = None) -> list[str]:
    """What requests of so many tokens are told, by a server with a quarter of the limits."""
    quota = Quota(fixed=limits.buckets("tenant", "acme"), tenant="acme")

    async def run() -> list[str]:
        store = GuardedStore(
            GoneStore(), LocalStore(), policy="local", share=0.25, on_state=lambda up: None
        )
        shed: list[str] = []
        limiter = Limiter(store, lambda scope, kind: None, shed.append)
        told = []
        for number, tokens in enumerate(num_tokens):
            try:
                reservation = await limiter.reserve(
                    quota, "", tokens, b"%d" % number, again=False, headers={}
                )
                if true_up is not None:
                    await reservation.true_up(true_up)
            except TooLargeForLimit as error:
                told.append(error.code)
            except Overloaded as error:
                told.append(error.message.split("more than ")[-1])
            else:
                told.append("granted")
                reservation.settle()
        await limiter.close()
        assert shed == ["limit_store"] * told.count(SHARE)
        return told

    return asyncio.run(run())


SHARE = "this server's share of a limit; try again"
TOKENS = Limits(tokens_per_minute=6, burst_tokens=100)


def test_more_than_the_share_and_not_more_than_the_limit_is_told_to_come_again():
    assert ask(TOKENS, 25, 26, 100, 101) == [
        "granted",
        SHARE,
        SHARE,
        "request_exceeds_rate_limit",  # that it always is
    ]


@pytest.mark.parametrize(("more", "told"), [(60, SHARE), (101, TooLargeForLimit.code)])
def test_so_is_what_turns_out_to_be_more(more, told):
    assert ask(TOKENS, 10, true_up=more) == [told]


def test_a_share_of_few_requests_is_one():
    assert ask(Limits(requests_per_minute=60, burst_requests=2), 1) == ["granted"]


def test_a_store_that_is_back_is_found_though_nobody_comes():
    class Coming(GoneStore):
        is_there = False

        async def renew(self, used: dict[str, list[float]]) -> None:
            if not self.is_there:
                await super().renew(used)

    async def run() -> None:
        shared, told, now_s = Coming(), [], [100.0]
        store = GuardedStore(
            shared,
            LocalStore(),
            policy="closed",
            share=0.25,
            on_state=told.append,
            clock_s=lambda: now_s[0],
        )
        await store.renew({})  # nobody asks a store that works
        assert told == []
        await store.renew({"x": [1.0]})
        now_s[0] += 10
        await store.renew({})
        assert told == [False]
        shared.is_there = True
        now_s[0] += 10
        await store.renew({})
        assert told == [False, True]

    asyncio.run(run())
