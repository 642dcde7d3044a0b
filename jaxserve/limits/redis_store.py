"""The store that several servers share: Redis or Valkey, one Lua script, the server's own clock.

Every operation is one call of `account.lua`, so it is atomic, and however many workers and servers
ask, a limit is the limit. Keys have the configured prefix and expire when they say no more than a
full bucket does. The package `redis` is imported only here, where a URL is configured.
"""

from __future__ import annotations

import itertools
from importlib import resources
from typing import Any

import msgspec

from jaxserve.errors import ConfigError
from jaxserve.limits.bucket import Bucket
from jaxserve.limits.store import LEASE_S, Answer, StoreFailure, Take

#: Connections of a process; more questions at once wait for one, at most so long.
_MAX_CONNECTIONS = 16
_QUEUE_S = 1.0
#: Leases in one call: Redis does nothing else meanwhile, and the call has a time limit.
_RENEWED_AT_ONCE = 128


class _Reply(msgspec.Struct):
    granted: bool
    units: list[float]
    levels: list[float]
    culprit: int
    retry_after_s: float
    promised: bool


class RedisStore:
    """A `Store`; see the module.

    Args:
        url: redis://, rediss:// or unix://, with user, password and database where needed.
        prefix: of all keys.
        timeout_s: an answer that takes longer is a `StoreFailure`.
        lease_s: of reservations.
        clock_s: of tests, instead of the server's.

    Raises:
        ConfigError: the URL is wrong, or the package is missing.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        timeout_s: float,
        lease_s: float = LEASE_S,
        clock_s: Any = None,
    ) -> None:
        try:
            from redis import asyncio as redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import ConnectionError as Lost
            from redis.exceptions import RedisError
        except ImportError:
            raise ConfigError(
                "limits.redis_url needs the package redis: pip install 'jaxserve[redis]'"
            ) from None
        self._failures = (RedisError, OSError)
        self._lease_s = lease_s
        self._clock_s = clock_s
        self._prefix = f"{{{prefix}}}"
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=max(timeout_s, _QUEUE_S),
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # A connection that the server closed long ago is found out by using it.
                retry=Retry(NoBackoff(), 1, supported_errors=(Lost,)),
            )
        except ValueError as error:
            raise ConfigError(f"limits.redis_url cannot be used: {error}") from None
        self._client = redis.Redis.from_pool(pool)
        script = resources.files(__package__).joinpath("account.lua").read_text(encoding="utf-8")
        self._script = self._client.register_script(script)

    async def take(self, take: Take) -> Answer:
        """See `Store`."""
        return _answer(await self._call("take", _fields(take)))

    async def change(self, take: Take) -> Answer:
        """See `Store`."""
        return _answer(await self._call("change", _fields(take)))

    async def renew(self, used: dict[str, list[float]]) -> None:
        """See `Store`."""
        parts = itertools.batched(used.items(), _RENEWED_AT_ONCE)
        for some in parts if used else [()]:  # nothing is asked as well: is it there?
            await self._call("renew", {"used": dict(some)})

    async def settle(self, id: str, used: list[float]) -> None:
        """See `Store`."""
        await self._call("settle", {"id": id, "used": used})

    async def close(self) -> None:
        """See `Store`."""
        await self._client.aclose()

    async def _call(self, operation: str, arguments: dict[str, Any]) -> bytes:
        arguments["lease"] = self._lease_s
        if self._clock_s is not None:
            arguments["now"] = self._clock_s()
        packed = msgspec.msgpack.encode(arguments)
        try:
            return await self._script(keys=[self._prefix], args=[operation, packed])
        except self._failures as error:
            raise StoreFailure(f"{type(error).__name__}: {error}") from error


def _fields(take: Take) -> dict[str, Any]:
    return {
        "id": take.id,
        "buckets": [_bucket(bucket) for bucket in take.buckets],
        "units": take.units,
        "fingerprint": take.fingerprint.hex(),
        "again": take.again,
    }


def _bucket(bucket: Bucket) -> dict[str, Any]:
    counts = bucket.kind == "requests"
    return {
        "name": bucket.name,
        "rate": bucket.rate,
        "burst": bucket.burst,
        "counts": counts,
    }


def _answer(packed: bytes) -> Answer:
    reply = msgspec.msgpack.decode(packed, type=_Reply)
    return Answer(
        granted=reply.granted,
        units=reply.units,
        levels=reply.levels,
        culprit=reply.culprit,
        retry_after_s=reply.retry_after_s,
        promised=reply.promised,
    )
