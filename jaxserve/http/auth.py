"""Who calls: API keys from a key file, and what their holder may do.

A row of the file holds the SHA-256 of a key, never the key. Without a key file everybody is one
anonymous admin, so the server then listens on loopback only (`check_exposure`).

    keys:
      - hash: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        tenant: acme
        role: user            # or admin
        priority: 0           # given to requests that name none; smaller is served first
        priority_ceiling: -5  # the smallest that its requests may name; its priority where absent

Invariant: every row is compared in full for every key that is presented, so timing tells nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxserve.config import HttpConfig
from jaxserve.errors import ConfigError, Forbidden, JaxserveError, Unauthenticated
from jaxserve.http.errors import send_error

#: Bound of priorities, either way.
MAX_PRIORITY = 1_000_000

#: Paths that need no key, and paths that need an admin's.
PUBLIC_PATHS = frozenset({"/health", "/ready"})
ADMIN_PATHS = frozenset({"/metrics"})

_COLUMNS = ("hash", "tenant", "role", "priority", "priority_ceiling")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whom a request is done for.

    Attributes:
        tenant: who is charged; "" for the anonymous one.
        admin: whether the holder may see and change what belongs to all.
        priority: of requests that name none; smaller is served first.
        priority_ceiling: the smallest they may name.
    """

    tenant: str = ""
    admin: bool = False
    priority: int = 0
    priority_ceiling: int = 0


ANONYMOUS = Identity(admin=True, priority_ceiling=-MAX_PRIORITY)


class KeyRing:
    """The keys that are known; empty means that none is asked for."""

    def __init__(self, rows: list[tuple[bytes, Identity]] | None = None) -> None:
        self._rows = rows

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


def load_keys(config: HttpConfig) -> KeyRing:
    """The key ring of a configuration.

    Raises:
        ConfigError: the file cannot be read, or a row is wrong; names the row.
    """
    if not config.key_file:
        return KeyRing()
    path = Path(config.key_file)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the key file {path}: {reason}") from error
    rows = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows or set(document) != {"keys"}:
        raise ConfigError(f"the key file {path} must hold one list of rows under 'keys'")
    ring = [_row(f"row {number} of {path}", row) for number, row in enumerate(rows, 1)]
    if len({digest for digest, _ in ring}) < len(ring):
        raise ConfigError(f"the key file {path} holds the same hash twice")
    return KeyRing(ring)


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
                scope["jaxserve.identity"] = self._admit(scope)
            except JaxserveError as error:
                await send_error(send, error)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Any) -> Identity:
        authorization = dict(scope["headers"]).get(b"authorization")
        identity = self._keys.identify(authorization)
        if scope["path"] in ADMIN_PATHS and not identity.admin:
            raise Forbidden(f"{scope['path']} needs a key of the admin role")
        return identity


def _row(where: str, row: Any) -> tuple[bytes, Identity]:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be a mapping of {', '.join(_COLUMNS)}")
    for key in row:
        if key not in _COLUMNS:
            near = difflib.get_close_matches(str(key), _COLUMNS, 1, 0.0)[0]
            raise ConfigError(f"{where}: unknown key {key!r}; the nearest is {near!r}")
    digest, tenant, role = row.get("hash"), row.get("tenant"), row.get("role", "user")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ConfigError(f"{where}: hash must be the SHA-256 of a key, 64 hexadecimal digits")
    if not isinstance(tenant, str) or not tenant:
        raise ConfigError(f"{where}: tenant must be a name, got {tenant!r}")
    if role not in ("user", "admin"):
        raise ConfigError(f"{where}: role must be user or admin, got {role!r}")
    priority = _priority(where, "priority", row.get("priority", 0))
    ceiling = _priority(where, "priority_ceiling", row.get("priority_ceiling", priority))
    if ceiling > priority:
        raise ConfigError(f"{where}: priority {priority} is above its own ceiling {ceiling}")
    identity = Identity(
        tenant=tenant, admin=role == "admin", priority=priority, priority_ceiling=ceiling
    )
    return bytes.fromhex(digest), identity


def _priority(where: str, name: str, value: Any) -> int:
    if type(value) is not int or abs(value) > MAX_PRIORITY:
        limit = f"an integer between {-MAX_PRIORITY} and {MAX_PRIORITY}"
        raise ConfigError(f"{where}: {name} must be {limit}, got {value!r}")
    return value


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
