"""Rate limits as a request meets them: reserve an estimate, true it up, settle what was used.

    reservation = await limiter.reserve(…)     before tokenizing: raises RateLimited
    await reservation.true_up(…)               after tokenizing: raises RateLimited
    reservation.follow(…)                      while it runs, its lease is renewed with what it used
    reservation.settle()                       at its end, whatever way it ends; twice is harmless

Invariants: a running request is never stopped for a limit: output beyond the reservation becomes
debt. What was reserved and not used goes back exactly once: here, or when the lease ends because
this process died.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from jaxserve.errors import JaxserveError, Overloaded, RateLimited, TooLargeForLimit
from jaxserve.limits.bucket import EPSILON, Bucket
from jaxserve.limits.headers import Headers, rate_headers
from jaxserve.limits.quota import Quota
from jaxserve.limits.store import LEASE_S, Answer, Store, StoreFailure, Take

logger = logging.getLogger(__name__)

#: How often running requests say what they have used.
RENEW_S = LEASE_S / 6
#: When to come again while the store is gone and the policy is "closed".
CLOSED_RETRY_S = 2.0


class Limiter:
    """The rate limits of one process.

    Args:
        store: keeps the buckets.
        on_limited: called with scope and kind of the bucket that refused a request.
        on_shed: called with the reason for each request that is refused since the store is gone.
    """

    def __init__(
        self,
        store: Store,
        on_limited: Callable[[str, str], None],
        on_shed: Callable[[str], None],
    ) -> None:
        self._store = store
        self._on_limited = on_limited
        self._on_shed = on_shed
        self._running: dict[str, Reservation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    async def reserve(
        self,
        quota: Quota,
        user: str,
        num_tokens: int,
        fingerprint: bytes,
        *,
        again: bool,
        headers: Headers,
    ) -> Reservation:
        """Reserves one request of so many tokens.

        Args:
            num_tokens: estimated, prompt and output.
            fingerprint: of the request; equal when it is sent again.
            again: the client says that it sends it again.
            headers: of the answer, whatever it will be; gets what the store says.

        Raises:
            RateLimited: a bucket has too little; says when to come again.
            TooLargeForLimit: no bucket could ever have that much.
            Overloaded: the store is gone, and nothing is let in without it.
        """
        buckets = quota.buckets(user)
        whole = hashlib.blake2b(fingerprint, digest_size=16)
        for bucket in buckets:
            whole.update(b"\0" + bucket.name.encode())
        take = Take(
            id=secrets.token_hex(12),
            buckets=buckets,
            units=_units(buckets, num_tokens),
            fingerprint=whole.digest(),
            again=again,
        )
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew(), name="jaxserve leases")
        answer = await self._ask(self._store.take, take, headers)
        self._running[take.id] = reservation = Reservation(self, take, answer, headers)
        return reservation

    async def change(self, take: Take, headers: Headers) -> Answer:
        """Other units for a reservation; raises as `reserve`, and it is given back then."""
        try:
            return await self._ask(self._store.change, take, headers)
        except JaxserveError:
            self._running.pop(take.id, None)
            raise

    def settle(self, id: str, used: list[float]) -> None:
        """Settles in the background; the answer to the client does not wait for it."""
        if self._running.pop(id, None) is None:
            return
        task = asyncio.get_running_loop().create_task(self._settle(id, used))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Finishes what is under way and lets go of the store."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self._store.close()

    async def _ask(
        self,
        call: Callable[[Take], Coroutine[Any, Any, Answer]],
        take: Take,
        headers: Headers,
    ) -> Answer:
        try:
            answer = await call(take)
        except StoreFailure as error:
            self._on_shed("limit_store")
            raise Overloaded(f"{error}; try again", retry_after_s=CLOSED_RETRY_S) from None
        headers.update(rate_headers(take.buckets, answer.levels))
        if not answer.granted:
            bucket = take.buckets[answer.culprit]
            self._on_limited(bucket.scope, bucket.kind)
            raise _refusal(take, answer)
        return answer

    async def _settle(self, id: str, used: list[float]) -> None:
        try:
            await self._store.settle(id, used)
        except StoreFailure as error:
            logger.warning("a reservation is left to the end of its lease: %s", error)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            used = {id: reservation.used() for id, reservation in self._running.items()}
            try:
                await self._store.renew(used)
            except StoreFailure as error:
                logger.warning("leases could not be renewed: %s", error)


class Reservation:
    """What one request has reserved; see the module."""

    def __init__(self, limiter: Limiter, take: Take, answer: Answer, headers: Headers) -> None:
        self._limiter = limiter
        self._take = take
        self._reserved = answer.units
        self._headers = headers
        self._spent: Callable[[], int] = _nothing

    async def true_up(self, num_tokens: int) -> None:
        """Now the prompt's tokens are known: reserves exactly so many, prompt and output.

        Raises:
            As `Limiter.reserve`; the reservation has been given back then.
        """
        take = self._take
        units = _units(take.buckets, num_tokens)
        if list(units) == self._reserved:
            return
        self._take = Take(
            id=take.id, buckets=take.buckets, units=units, fingerprint=take.fingerprint
        )
        await self._limiter.change(self._take, self._headers)

    def follow(self, spent: Callable[[], int]) -> None:
        """From now on `spent` says how many tokens have been used, prompt and output."""
        self._spent = spent

    def used(self) -> list[float]:
        """Units used so far, by bucket."""
        return list(map(float, _units(self._take.buckets, self._spent())))

    def settle(self) -> None:
        """The request has ended: what it did not use goes back."""
        self._limiter.settle(self._take.id, self.used())


def _units(buckets: tuple[Bucket, ...], num_tokens: int) -> tuple[float, ...]:
    return tuple(1.0 if bucket.kind == "requests" else float(num_tokens) for bucket in buckets)


def _refusal(take: Take, answer: Answer) -> RateLimited | TooLargeForLimit:
    bucket, units = take.buckets[answer.culprit], take.units[answer.culprit]
    whose = {"key": "API key", "user": "user", "tenant": "tenant"}[bucket.scope]
    asked = "the request" if bucket.kind == "requests" else f"the request's {units:.0f} tokens"
    if math.isinf(answer.retry_after_s):
        return TooLargeForLimit(
            f"{asked} (prompt and max_tokens) exceed what this {whose} may use at once, "
            f"{bucket.burst:g} {bucket.kind}: it can never be served; shorten it or lower "
            "max_tokens",
            param="max_tokens",
        )
    left = max(0, math.floor(answer.levels[answer.culprit] + EPSILON))
    return RateLimited(
        f"rate limit of this {whose} reached: {bucket.rate * 60:g} {bucket.kind} a minute; "
        f"{left} are left and {asked} came; try again in {answer.retry_after_s:.3f} s",
        retry_after_s=answer.retry_after_s,
    )


def _nothing() -> int:
    return 0
