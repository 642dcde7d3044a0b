"""The key file: API keys by their hash, tenants, and the limits of both.

    tenants:
      - name: acme
        weight: 2                # share beside tenants of weight 1
        priority: normal         # of requests that name none: high, low, or a number
        priority_ceiling: high   # the smallest that its requests may name; its priority if absent
        limits: {requests_per_minute: 600, tokens_per_minute: 200000}
        user_limits: {requests_per_minute: 60}   # of each `user` that its requests name
        budget: {soft: 100, hard: 120}           # a month, in `metering.currency`
    keys:
      - hash: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        tenant: acme
        name: ci                 # in usage, costs and traces; made from the hash if absent
        role: user               # or admin
        priority: 0              # the tenant's if absent, as the ceiling, which it cannot exceed
        limits: {requests_per_minute: 100, burst_requests: 20}

A tenant that keys name needs no row: it has weight 1 and no limits then.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from jaxserve.config import HttpConfig
from jaxserve.errors import ConfigError
from jaxserve.http.auth import MAX_PRIORITY, Identity, KeyRing
from jaxserve.http.sampling import PRIORITIES
from jaxserve.limits.quota import Limits, Quota, read_limits
from jaxserve.metering.budgets import read_budget
from jaxserve.types import MAX_WEIGHT, MIN_WEIGHT

_KEY = ("hash", "tenant", "name", "role", "priority", "priority_ceiling", "limits")
_TENANT = ("name", "weight", "priority", "priority_ceiling", "limits", "user_limits", "budget")
_NO_LIMITS = Limits()
#: Characters of a key's name.
MAX_NAME = 64


class _Tenant:
    """A row of `tenants`, or what a tenant without one has."""

    def __init__(self, where: str, row: dict[str, Any]) -> None:
        self.name: str = row["name"]
        self.weight = _weight(where, row.get("weight", 1.0))
        self.priority, self.ceiling = _priorities(where, row, 0, None)
        self.is_capped = "priority_ceiling" in row
        self.limits = read_limits(f"{where}: limits", row.get("limits")) or _NO_LIMITS
        self.user_limits = read_limits(f"{where}: user_limits", row.get("user_limits"))
        self.budget = read_budget(f"{where}: budget", row.get("budget"))


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
    if not isinstance(rows, list) or not rows or not set(document) <= {"keys", "tenants"}:
        raise ConfigError(
            f"the key file {path} must hold a list of rows under 'keys', and may hold one under "
            "'tenants'"
        )
    tenants = _read_tenants(path, document.get("tenants"))
    ring = [_row(f"row {number} of {path}", row, tenants) for number, row in enumerate(rows, 1)]
    if len({digest for digest, _ in ring}) < len(ring):
        raise ConfigError(f"the key file {path} holds the same hash twice")
    return KeyRing(ring)


def _read_tenants(path: Path, rows: Any) -> dict[str, _Tenant]:
    if rows is None:
        return {}
    if not isinstance(rows, list):
        raise ConfigError(f"'tenants' of the key file {path} must be a list of rows")
    tenants: dict[str, _Tenant] = {}
    for number, row in enumerate(rows, 1):
        where = f"tenant {number} of {path}"
        _check_columns(where, row, _TENANT)
        name = row.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where}: name must be a name, got {name!r}")
        if name in tenants:
            raise ConfigError(f"{where}: there is a tenant {name!r} before it")
        tenants[name] = _Tenant(where, row)
    return tenants


def _row(where: str, row: Any, tenants: dict[str, _Tenant]) -> tuple[bytes, Identity]:
    _check_columns(where, row, _KEY)
    digest, name, role = row.get("hash"), row.get("tenant"), row.get("role", "user")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ConfigError(f"{where}: hash must be the SHA-256 of a key, 64 hexadecimal digits")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: tenant must be a name, got {name!r}")
    if role not in ("user", "admin"):
        raise ConfigError(f"{where}: role must be user or admin, got {role!r}")
    called = row.get("name", _store_name(digest)[:12])
    if not isinstance(called, str) or not called or len(called) > MAX_NAME:
        raise ConfigError(f"{where}: name must be a text of up to {MAX_NAME}, got {called!r}")
    tenant = tenants.get(name) or _Tenant(where, {"name": name})
    own_ceiling = tenant.ceiling if tenant.is_capped else None
    priority, ceiling = _priorities(where, row, tenant.priority, own_ceiling)
    if tenant.is_capped and ceiling < tenant.ceiling:
        raise ConfigError(
            f"{where}: priority_ceiling {ceiling} is above its tenant's of {tenant.ceiling} "
            "(smaller numbers are served first)"
        )
    limits = read_limits(f"{where}: limits", row.get("limits")) or _NO_LIMITS
    identity = Identity(
        tenant=name,
        key=called,
        admin=role == "admin",
        priority=priority,
        priority_ceiling=ceiling,
        weight=tenant.weight,
        quota=Quota(
            fixed=limits.buckets("key", _store_name(digest))
            + tenant.limits.buckets("tenant", name),
            per_user=tenant.user_limits,
            tenant=name,
        ),
        budget=tenant.budget,
    )
    return bytes.fromhex(digest), identity


def _store_name(digest: str) -> str:
    """What a key is called in a store: not its hash, since others may read that store."""
    return hashlib.blake2b(bytes.fromhex(digest), digest_size=16).hexdigest()


def _check_columns(where: str, row: Any, columns: tuple[str, ...]) -> None:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be a mapping of {', '.join(columns)}")
    for key in row:
        if key not in columns:
            near = difflib.get_close_matches(str(key), columns, 1, 0.0)[0]
            raise ConfigError(f"{where}: unknown key {key!r}; the nearest is {near!r}")


def _priorities(
    where: str, row: dict[str, Any], default: int, default_ceiling: int | None
) -> tuple[int, int]:
    priority = _priority(where, "priority", row.get("priority", default))
    fallback = priority if default_ceiling is None else min(priority, default_ceiling)
    ceiling = _priority(where, "priority_ceiling", row.get("priority_ceiling", fallback))
    if ceiling > priority:
        raise ConfigError(f"{where}: priority {priority} is above its own ceiling {ceiling}")
    return priority, ceiling


def _priority(where: str, name: str, value: Any) -> int:
    if type(value) is str and value in PRIORITIES:
        return PRIORITIES[value]
    if type(value) is not int or abs(value) > MAX_PRIORITY:
        words = ", ".join(PRIORITIES)
        limit = f"{words}, or an integer between {-MAX_PRIORITY} and {MAX_PRIORITY}"
        raise ConfigError(f"{where}: {name} must be {limit}, got {value!r}")
    return value


def _weight(where: str, value: Any) -> float:
    if type(value) not in (int, float) or not MIN_WEIGHT <= value <= MAX_WEIGHT:
        raise ConfigError(
            f"{where}: weight must be a number between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}, got "
            f"{value!r}"
        )
    return float(value)
