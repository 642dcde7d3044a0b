"""OpenAI's `x-ratelimit-*` headers, from what the store said about a request's buckets.

Of several buckets of a kind the one that leaves least is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxserve.limits.bucket import Bucket

#: Headers to add to an answer.
Headers = dict[bytes, bytes]


def rate_headers(buckets: Sequence[Bucket], levels: Sequence[float]) -> Headers:
    """Limit a minute, what remains now, and when the bucket is full again; by kind."""
    headers: Headers = {}
    for kind in ("requests", "tokens"):
        tightest: tuple[float, Bucket] | None = None
        for bucket, level in zip(buckets, levels, strict=False):  # no levels: no store was asked
            if bucket.kind == kind and (tightest is None or level < tightest[0]):
                tightest = level, bucket
        if tightest is None:
            continue
        level, bucket = tightest
        full_s = max(0.0, bucket.burst - level) / bucket.rate
        for name, value in (
            ("limit", str(round(bucket.rate * 60))),
            ("remaining", str(max(0, math.floor(level + 1e-6)))),
            ("reset", duration(full_s)),
        ):
            headers[f"x-ratelimit-{name}-{kind}".encode()] = value.encode()
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 6ms, 1.5s, 6m0s, 1h2m3s."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    whole, rest = divmod(milliseconds, 60_000)
    last = f"{rest / 1000:g}s"
    hours, minutes = divmod(whole, 60)
    if hours:
        return f"{hours}h{minutes}m{last}"
    return f"{minutes}m{last}" if minutes else last
