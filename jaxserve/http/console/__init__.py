"""The console's page: files that are served as they are, to anyone, since no data is in them.

The page is `console.html`; its modules and style lie beside it and are loaded from here alone,
which its Content-Security-Policy holds it to. What it shows it asks for with the caller's key
(`http.observer.console`). There is no build step: what lies here is what runs in the browser.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

from jaxserve.errors import JaxserveError

_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
#: Where the page is, and where its files are.
PATH = "/console"
PAGE = "console.html"
#: No markup can become code: nothing is inline, and text never becomes elements (Trusted Types).
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),  # asked again each time, and mostly answered 304
]


def _files() -> dict[str, tuple[bytes, bytes]]:
    """Type and content of each file, by its path."""
    found = {}
    for entry in resources.files(__name__).iterdir():
        kind = _TYPES.get(f".{entry.name.rpartition('.')[2]}")
        if kind is not None:
            path = PATH if entry.name == PAGE else f"{PATH}/{entry.name}"
            found[path] = kind, entry.read_bytes()
    return found


_FILES = _files()
#: Of the page and its files: they need no key.
PATHS = frozenset(_FILES)


class ConsoleFile:
    """ASGI: the page, or one of its files.

    Args:
        path: one of `PATHS`.
    """

    def __init__(self, path: str) -> None:
        self._type, self._content = _FILES[path]
        self._tag = b'"' + hashlib.sha256(self._content).hexdigest()[:32].encode() + b'"'

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers with the file, or 304 where the browser has it."""
        known = dict(scope["headers"]).get(b"if-none-match", b"")
        same = self._tag in known
        body = b"" if same or scope["method"] == "HEAD" else self._content
        headers = [(b"etag", self._tag), *_HEADERS]
        if not same:
            headers.append((b"content-type", self._type))
            headers.append((b"content-length", b"%d" % len(self._content)))
        status = 304 if same else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class RequestNotFound(JaxserveError):
    """The console does not know the request, any more or yet."""

    code = "request_not_found"
    status = 404
