"""What happens while the shared store is gone: the configured policy, and the way back.

A failure opens the circuit: for a pause, which doubles up to `MAX_PAUSE_S`, nobody waits for the
store, and every request is dealt with by the policy. Then one request tries it; if it answers, all
go there again. Policies: "open" lets everything in, "closed" refuses everything, "local" enforces
`limits.local_share` of every limit on this server alone. There, what is more than the share of a
burst, and not more than the burst, has to wait for the shared store.

Invariants: a reservation is changed and settled where it was made; what was made in a store that
then went away is settled by that store when its lease ends.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable

from jaxserve.limits.bucket import Bucket
from jaxserve.limits.store import Answer, Store, StoreFailure, Take

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 5.0


class GuardedStore:
    """A `Store` that stands in for a shared one that fails; see the module.

    Raises `StoreFailure` for what is not let in without the shared one.

    Args:
        shared: the store that may fail.
        local: this server's own, for the policy "local".
        policy: `limits.when_store_fails`.
        share: `limits.local_share`.
        on_state: called with whether the shared store is in use, when that changes.
        clock_s: monotonic.
    """

    def __init__(
        self,
        shared: Store,
        local: Store,
        *,
        policy: str,
        share: float,
        on_state: Callable[[bool], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared = shared
        self._local = local
        self._policy = policy
        self._share = share
        self._on_state = on_state
        self._clock_s = clock_s
        self._retry_s = 0.0
        self._pause_s = 0.0
        self._trying = False
        self._elsewhere: set[str] = set()  # reservations that the shared store knows nothing of

    async def take(self, take: Take) -> Answer:
        """See `Store`."""
        return await self._ask(self._shared.take, self._local.take, take)

    async def change(self, take: Take) -> Answer:
        """See `Store`."""
        if take.id in self._elsewhere:
            return await self._instead(self._local.change, take)
        return await self._ask(self._shared.change, self._local.take, take)

    async def renew(self, used: dict[str, list[float]]) -> None:
        """See `Store`."""
        there = {id: units for id, units in used.items() if id not in self._elsewhere}
        here = {id: units for id, units in used.items() if id in self._elsewhere}
        if here and self._policy == "local":
            await self._local.renew(here)
        if there or self._pause_s:  # so that it is found to be back though nobody comes
            await self._try(lambda: self._shared.renew(there))

    async def settle(self, id: str, used: list[float]) -> None:
        """See `Store`."""
        if id not in self._elsewhere:
            await self._try(lambda: self._shared.settle(id, used))
            return
        self._elsewhere.discard(id)
        if self._policy == "local":
            await self._local.settle(id, used)

    async def close(self) -> None:
        """See `Store`."""
        await self._shared.close()
        await self._local.close()

    async def _ask(
        self,
        ask: Callable[[Take], Awaitable[Answer]],
        instead: Callable[[Take], Awaitable[Answer]],
        take: Take,
    ) -> Answer:
        answer = await self._try(lambda: ask(take))
        return answer if answer is not None else await self._instead(instead, take)

    async def _try[T](self, call: Callable[[], Awaitable[T]]) -> T | None:
        """What the shared store says; None if it is gone, or was and it is not time to try it."""
        if self._pause_s:
            if self._trying or self._clock_s() < self._retry_s:
                return None
            self._trying = True
        tried = self._trying
        try:
            answer = await call()
        except StoreFailure as error:
            self._failed(error, tried)
            return None
        else:
            self._works()
            return answer
        finally:
            if tried:
                self._trying = False

    async def _instead(self, ask_local: Callable[[Take], Awaitable[Answer]], take: Take) -> Answer:
        if self._policy == "closed":
            raise StoreFailure("the store of the rate limits cannot be reached")
        if self._policy == "open":
            self._elsewhere.add(take.id)
            return Answer(granted=True, units=list(take.units), levels=[])
        fits = all(u <= bucket.burst for bucket, u in zip(take.buckets, take.units, strict=True))
        smaller = tuple(_shared_out(bucket, self._share) for bucket in take.buckets)
        take = Take(
            id=take.id,
            buckets=smaller,
            units=take.units,
            fingerprint=take.fingerprint,
            again=take.again,
        )
        answer = await ask_local(take)
        if answer.granted:
            self._elsewhere.add(take.id)
        else:
            self._elsewhere.discard(take.id)
            if math.isinf(answer.retry_after_s) and fits:
                raise StoreFailure(
                    "the store of the rate limits cannot be reached, and the request is more than "
                    "this server's share of a limit"
                )
        return answer

    def _failed(self, error: StoreFailure, tried: bool) -> None:
        if not self._pause_s:
            logger.warning("rate limits: %s; until it is back: %s", error, self._policy)
            self._on_state(False)
        if tried or not self._pause_s:  # others may fail together with the first
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), MAX_PAUSE_S)
            self._retry_s = self._clock_s() + self._pause_s

    def _works(self) -> None:
        if self._pause_s:
            logger.warning("rate limits: the shared store is back")
            self._on_state(True)
            self._pause_s = 0.0


def _shared_out(bucket: Bucket, share: float) -> Bucket:
    burst = bucket.burst * share
    if bucket.kind == "requests":  # a share below one would let nothing in
        burst = max(burst, min(bucket.burst, 1.0))
    return Bucket(
        name=bucket.name,
        scope=bucket.scope,
        kind=bucket.kind,
        rate=bucket.rate * share,
        burst=burst,
    )
