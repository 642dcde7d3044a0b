"""Until when a request is worth doing: from its header, its body, and the server's default.

`x-request-deadline` is taken in each of the ways in which proxies and clients write it: seconds
since 1970 (or milliseconds, from 10^12 on), an ISO 8601 time with its zone, or what is left: plain
seconds below 10^9, or a number with a unit, gRPC's (`H M S m u n`) or `ms` and `s`.
"""

from __future__ import annotations

import datetime
import math
import re

from jaxserve.errors import InvalidRequest

HEADER = b"x-request-deadline"
#: No deadline is further away.
MAX_TIMEOUT_S = 86_400.0 * 30

_UNITS_S = {
    "H": 3600.0,
    "M": 60.0,
    "S": 1.0,
    "s": 1.0,
    "m": 1e-3,
    "ms": 1e-3,
    "u": 1e-6,
    "us": 1e-6,
    "n": 1e-9,
    "ns": 1e-9,
}
# So many decimals as a float has that was computed (a deadline less the time).
_NUMBER = re.compile(r"([0-9]{1,20}(?:\.[0-9]{0,40})?)\s*([A-Za-z]{0,2})")


def read_deadline(value: bytes, now_s: float) -> float:
    """Seconds that are left, as the header says; below zero if it has passed.

    Args:
        now_s: seconds since 1970.

    Raises:
        InvalidRequest: it is none of the forms.
    """
    text = value.decode("latin-1").strip()
    match = _NUMBER.fullmatch(text)
    if match is not None and (not match[2] or match[2] in _UNITS_S):
        number = float(match[1])
        if match[2]:
            return min(number * _UNITS_S[match[2]], MAX_TIMEOUT_S)
        if number >= 1e12:
            number /= 1e3
        return min(number - now_s if number >= 1e9 else number, MAX_TIMEOUT_S)
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise InvalidRequest(
            f"{HEADER.decode()} must be seconds since 1970, an ISO 8601 time with its zone, or "
            f"what is left (2.5, 2500ms, 500m), got {text[:60]!r}",
            param=HEADER.decode(),
        )
    return min(at.timestamp() - now_s, MAX_TIMEOUT_S)


def earliest_s(*timeouts_s: float | None, default_s: float) -> float:
    """The least of what is given; the default where nothing is; inf where that is 0."""
    given = [timeout for timeout in timeouts_s if timeout is not None]
    return min(given, default=default_s or math.inf)
