"""uvicorn's HTTP/1 protocol, with what it leaves open.

A head is bounded, which uvicorn would collect without a limit. What cannot be parsed is answered
with our own error body. An offer to upgrade is ignored, as HTTP lets a server do (RFC 9110, 7.8):
uvicorn takes the body for the other protocol's bytes. To an HTTP/1.0 client a stream ends with the
connection: it does not know chunks. And when a client leaves, the request that runs is told, though
another came behind it on the same connection: uvicorn tells the last one.
"""

from __future__ import annotations

from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from jaxserve.errors import HeadTooLarge, InvalidRequest, JaxserveError
from jaxserve.http.errors import error_body

#: Of a request's line and headers together.
MAX_HEAD_BYTES = 65_536

_STATUS_LINES = {
    400: b"HTTP/1.1 400 Bad Request\r\n",
    431: b"HTTP/1.1 431 Request Header Fields Too Large\r\n",
}


class BoundedProtocol(HttpToolsProtocol):
    """One connection; see the module."""

    _in_head = True
    _head_bytes = 0
    _upgrades = False
    _running: RequestResponseCycle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or the connection is closed."""
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Answers 431 and closes when a head goes on beyond the limit."""
        self._head_bytes += len(data)
        self._feed(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(
                HeadTooLarge(f"the request line and headers are over {MAX_HEAD_BYTES} bytes")
            )

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._ignore_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"this is not an HTTP request: {error}"))

    def on_headers_complete(self) -> None:
        """What follows is the body's matter."""
        self._in_head = False
        self._upgrades = self.parser.should_upgrade()
        if not self._upgrades:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next head begins."""
        if self._upgrades:
            return
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Reads the request once more, without the offer.

        Args:
            rest: what has come behind its head.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [method + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(
                    t for t in tokens if t.lower() not in (b"upgrade", b"http2-settings")
                )
            if name != b"upgrade" and value:
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _until_closed(app, cycle)
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, error: JaxserveError) -> None:
        body = msgspec.json.encode(error_body(error))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(_STATUS_LINES[error.status] + head % len(body) + body)
        self.transport.close()


def _until_closed(app: Any, cycle: RequestResponseCycle) -> Any:
    """The application, a body without a length being sent as it is, up to the connection's end."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        counted = True

        async def send_plain(message: Any) -> None:
            nonlocal counted
            if message["type"] == "http.response.start":
                counted = any(name == b"content-length" for name, _ in message["headers"])
                if not counted:
                    cycle.chunked_encoding = False
            elif not counted:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return wrapped
