"""Which store the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxserve.config import LimitsConfig
from jaxserve.limits.guard import GuardedStore
from jaxserve.limits.owner import OwnedStore
from jaxserve.limits.redis_store import RedisStore
from jaxserve.limits.store import LocalStore, Store


def make_store(config: LimitsConfig, owner: Path | None, on_state: Callable[[bool], None]) -> Store:
    """The store of one HTTP process.

    Args:
        owner: socket of the server's own store; None where this process is its only worker.
        on_state: called with whether the shared store is in use, when that changes.

    Raises:
        ConfigError: `limits.redis_url` cannot be used.
    """
    local = LocalStore() if owner is None else OwnedStore(owner)
    if not config.redis_url:
        return local
    return GuardedStore(
        shared_store(config),
        local,
        policy=config.when_store_fails,
        share=config.local_share,
        on_state=on_state,
    )


def shared_store(config: LimitsConfig) -> RedisStore:
    """The store that several servers share; connects when it is first asked.

    Raises:
        ConfigError: `limits.redis_url` cannot be used.
    """
    return RedisStore(
        config.redis_url,
        prefix=config.redis_prefix,
        timeout_s=config.store_timeout_ms / 1e3,
    )
