"""Errors on the wire: each `JaxserveError` as OpenAI's body, with the status from its class.

The table from error to status is `jaxserve.errors`; here is only how a status is called in the
body's `type`. Nothing else in http writes an error response.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from jaxserve.errors import (
    BudgetExceeded,
    EmbeddingNotFinite,
    Forbidden,
    JaxserveError,
    RequestQuarantined,
    Unauthenticated,
)

#: Seconds after which a client may try again what was `retryable`.
RETRY_AFTER_S = 1

_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}


class NotFound(JaxserveError):
    """No such path, or not by this method."""

    code = "not_found"
    status = 404


class MethodNotAllowed(JaxserveError):
    """The path exists, but not for this method.

    Args:
        allowed: methods that it takes, as the `Allow` header has them.
    """

    code = "method_not_allowed"
    status = 405

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


def error_body(error: JaxserveError) -> dict[str, Any]:
    """The body that OpenAI's clients read."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def error_event(error: JaxserveError) -> bytes:
    """The server-sent event that ends a stream which has already begun."""
    return b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"


async def send_error(send: Any, error: JaxserveError) -> None:
    """Answers a request with an error."""
    headers = []
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    elif isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode("latin-1")))
    elif isinstance(error, RequestQuarantined | EmbeddingNotFinite):
        headers.append((b"x-should-retry", b"false"))  # OpenAI's clients repeat any other 500
    elif error.retryable and not isinstance(error, Forbidden):
        retry_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        milliseconds = max(1, math.ceil(retry_s * 1000))
        headers.append((b"retry-after", b"%d" % -(-milliseconds // 1000)))
        headers.append((b"retry-after-ms", b"%d" % milliseconds))
    if isinstance(error, BudgetExceeded):
        headers.append((b"x-should-retry", b"false"))  # not for the rest of the month
    await send_json(send, error_body(error), status=error.status, headers=headers)


async def send_json(
    send: Any, value: Any, *, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Answers a request with a JSON document (or bytes that are one)."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    start = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *(headers or ()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
