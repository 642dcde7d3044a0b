"""Who calls: API keys, and what their holder may do.

The keys come from a key file (`http.keyfile`), which holds the SHA-256 of each, never the key.
Without one everybody is one anonymous admin, so the server then listens on loopback only
(`check_exposure`).

Invariant: every row is compared in full for every key that is presented, so timing tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field
from typing import Any

from jaxserve.config import HttpConfig
from jaxserve.errors import ConfigError, Forbidden, JaxserveError, Unauthenticated
from jaxserve.http.console import PATHS as CONSOLE_PATHS
from jaxserve.http.errors import send_error
from jaxserve.http.records import note_error, note_identity
from jaxserve.limits.quota import Quota
from jaxserve.metering.budgets import Budget

#: Bound of priorities, either way.
MAX_PRIORITY = 1_000_000

#: Paths that need no key, and paths that need an admin's.
PUBLIC_PATHS = frozenset({"/health", "/live", "/ready"}) | CONSOLE_PATHS
ADMIN_PATHS = frozenset(
    {
        *("/metrics", "/slo", "/v1/alerts", "/console/data", "/console/request"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whom a request is done for.

    Attributes:
        tenant: who is charged; "" for the anonymous one.
        key: what the key is called; never the key.
        admin: whether the holder may see and change what belongs to all.
        priority: of requests that name none; smaller is served first.
        priority_ceiling: the smallest they may name.
        weight: of the tenant's share.
        quota: rate limits of the key, of its tenant, and of its tenant's users.
        budget: of the tenant, for a month; None where it has none.
    """

    tenant: str = ""
    key: str = ""
    admin: bool = False
    priority: int = 0
    priority_ceiling: int = 0
    weight: float = 1.0
    quota: Quota = field(default_factory=Quota)
    budget: Budget | None = None


ANONYMOUS = Identity(admin=True, priority_ceiling=-MAX_PRIORITY)


class KeyRing:
    """The keys that are known; empty means that none is asked for."""

    def __init__(self, rows: list[tuple[bytes, Identity]] | None = None) -> None:
        self._rows = rows

    @property
    def tenants(self) -> list[str]:
        """Of all keys, in the file's order."""
        return list(dict.fromkeys(identity.tenant for _, identity in self._rows or ()))

    @property
    def is_limited(self) -> bool:
        """Whether any key has a rate limit."""
        return any(identity.quota.is_limited for _, identity in self._rows or ())

    @property
    def budgets(self) -> dict[str, Budget]:
        """By tenant, of those that have one."""
        identities = [identity for _, identity in self._rows or ()]
        return {who.tenant: who.budget for who in identities if who.budget is not None}

    def identify(self, authorization: bytes | None) -> Identity:
        """Whom an Authorization header stands for.

        Raises:
            Unauthenticated: there is none, or its key is not known.
        """
        if self._rows is None:
            return ANONYMOUS
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise Unauthenticated("no API key given; send the header Authorization: Bearer KEY")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for known, identity in self._rows:
            if hmac.compare_digest(known, digest):
                found = identity
        if found is None:
            raise Unauthenticated("the API key is not known here")
        return found


def check_exposure(config: HttpConfig) -> None:
    """Refuses to serve strangers.

    Raises:
        ConfigError: the host is not loopback and there is no key file.
    """
    if config.key_file or _is_loopback(config.host):
        return
    raise ConfigError(
        f"http.host is {config.host!r}, which others can reach, but there is no http.key_file; "
        "give one, or listen on 127.0.0.1"
    )


class Authentication:
    """ASGI: finds out who calls before anything else is done for them."""

    def __init__(self, app: Any, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes the request on with its `Identity`, or answers 401 or 403."""
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            try:
                identity = scope["jaxserve.identity"] = self._admit(scope)
                note_identity(scope, identity)
            except JaxserveError as error:
                note_error(scope, error)
                await send_error(send, error)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Any) -> Identity:
        authorization = dict(scope["headers"]).get(b"authorization")
        identity = self._keys.identify(authorization)
        if scope["path"] in ADMIN_PATHS and not identity.admin:
            raise Forbidden(f"{scope['path']} needs a key of the admin role")
        return identity


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
