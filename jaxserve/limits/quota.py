"""Limits as they stand in the key file, and the buckets that come of them.

    limits: {requests_per_minute: 600, tokens_per_minute: 200000, burst_requests: 60}

A burst that is not given is a minute's worth, and at least 1. Names in the store are hashed where a
client has a say in them (`user`), so no name collides with another, however long or strange.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.limits.bucket import Bucket

#: Bound of every number in a limit.
MAX_LIMIT = 10**12
_MINUTE_S = 60.0
_NAMES = ("requests_per_minute", "tokens_per_minute", "burst_requests", "burst_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What somebody may have; 0 sets no limit.

    Attributes:
        burst_requests, burst_tokens: what a full bucket holds.
    """

    requests_per_minute: float = 0
    tokens_per_minute: float = 0
    burst_requests: float = 0
    burst_tokens: float = 0

    def buckets(self, scope: str, name: str) -> tuple[Bucket, ...]:
        """The buckets of one owner of these limits."""
        made = []
        for kind, per_minute, burst in (
            ("requests", self.requests_per_minute, self.burst_requests),
            ("tokens", self.tokens_per_minute, self.burst_tokens),
        ):
            if per_minute:
                made.append(
                    Bucket(
                        name=f"{scope}:{name}:{kind}",
                        scope=scope,
                        kind=kind,
                        rate=per_minute / _MINUTE_S,
                        burst=burst or max(per_minute, 1.0),
                    )
                )
        return tuple(made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """All limits that a key's requests are under.

    Attributes:
        fixed: buckets of the key and of its tenant.
        per_user: limits of each `user` that the tenant's requests name.
        tenant: whose users they are.
    """

    fixed: tuple[Bucket, ...] = ()
    per_user: Limits | None = None
    tenant: str = ""

    @property
    def is_limited(self) -> bool:
        """Whether there is anything to ask a store about."""
        return bool(self.fixed) or self.per_user is not None

    @property
    def most_tokens(self) -> float:
        """What no request may have more of, of any user; inf where tokens are not limited."""
        buckets = self.buckets("") if self.is_limited else ()
        return min((b.burst for b in buckets if b.kind == "tokens"), default=math.inf)

    def buckets(self, user: str) -> tuple[Bucket, ...]:
        """The buckets of a request of this user ("" where it names none)."""
        if self.per_user is None:
            return self.fixed
        both = hashlib.blake2b(self.tenant.encode() + b"\0", digest_size=16)
        both.update(user.encode("utf-8", "surrogatepass"))
        return self.fixed + self.per_user.buckets("user", both.hexdigest())


def read_limits(where: str, row: Any) -> Limits | None:
    """Limits of a row of the key file; None where it has none.

    Raises:
        ConfigError: a name or number is wrong.
    """
    if row is None:
        return None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be a mapping of {', '.join(_NAMES)}")
    for name, value in row.items():
        if name not in _NAMES:
            raise ConfigError(f"{where}: unknown key {name!r}; there are {', '.join(_NAMES)}")
        if type(value) not in (int, float) or not 0 < value <= MAX_LIMIT:
            raise ConfigError(
                f"{where}: {name} must be a number above 0 and at most {MAX_LIMIT}, got {value!r}"
            )
    for kind in ("requests", "tokens"):
        if f"burst_{kind}" in row and f"{kind}_per_minute" not in row:
            raise ConfigError(f"{where}: burst_{kind} needs {kind}_per_minute")
        if row.get(f"burst_{kind}", 1) < 1:
            raise ConfigError(f"{where}: burst_{kind} below 1 would let nothing in")
    if not row:
        raise ConfigError(f"{where} is empty; leave it out, or give {', '.join(_NAMES)}")
    return Limits(**row)
