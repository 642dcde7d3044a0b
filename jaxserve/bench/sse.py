"""A streaming HTTP/1.1 client that costs next to nothing per event: asyncio, one POST a connection.

`post_stream` sends a JSON body and returns what came back, each event with the time at which its
bytes arrived. Bodies are parsed after the stream has ended, so that measuring 200 streams does not
slow the server on the same machine. Understands chunked bodies (RFC 9112, 7.1) and server-sent
events (WHATWG HTML, 9.2); no redirects, no compression (none is asked for).
"""

from __future__ import annotations

import asyncio
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go.

    Attributes:
        base_path: prefix of all paths, e.g. "" or "/proxy".
        headers: sent with each request.
    """

    host: str
    port: int
    tls: bool = False
    base_path: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str, api_key: str = "") -> Target:
        """From "http://host:port", with or without "/v1" at its end.

        Raises:
            ValueError: it is not an http or https address.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// or https:// address")
        tls = parts.scheme == "https"
        return cls(
            host=parts.hostname,
            port=parts.port or (443 if tls else 80),
            tls=tls,
            base_path=parts.path.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )


@dataclass(slots=True, kw_only=True)
class Response:
    """What came back.

    Attributes:
        status: 0 where no answer came.
        events: (CLOCK_MONOTONIC seconds, payload of the `data:` lines) of each event.
        body: all of it, of an answer that is not an event stream.
        complete: the body ended as HTTP says it must.
        error: why it did not come, or not to its end.
        started_s, ended_s: when the request was begun, and its last byte came.
    """

    status: int = 0
    events: list[tuple[float, bytes]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    error: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0


async def post_stream(
    target: Target, path: str, body: bytes, *, timeout_s: float, method: str = "POST"
) -> Response:
    """One request on a connection of its own; whatever goes wrong is told in the response."""
    response = Response(started_s=time.monotonic())
    loop = asyncio.get_running_loop()
    transport = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, receiver = await loop.create_connection(
                lambda: _Receiver(response, loop.create_future()),
                target.host,
                target.port,
                ssl=ssl.create_default_context() if target.tls else None,
            )
            transport.write(_head(target, path, len(body), method) + body)
            await receiver.done
    except TimeoutError:
        response.error = response.error or f"nothing whole after {timeout_s:g} s"
    except OSError as error:
        response.error = response.error or f"{type(error).__name__}: {error}"
    finally:
        if transport is not None:
            transport.abort()
    response.ended_s = response.ended_s or time.monotonic()
    return response


def _head(target: Target, path: str, length: int, method: str) -> bytes:
    lines = [
        f"{method} {target.base_path}{path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in target.headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Receiver(asyncio.Protocol):
    """Reads one response; `done` is set when it has ended, one way or the other."""

    def __init__(self, response: Response, done: asyncio.Future[None]) -> None:
        self.response = response
        self.done = done
        self._buffer = bytearray()
        self._head_read = False
        self._body = BodyDecoder()
        self._is_stream = False
        self._text = bytearray()  # of an event stream: what is not yet a whole event

    def data_received(self, data: bytes) -> None:
        """Notes events with the time of their arrival."""
        now = time.monotonic()
        if not self._head_read:
            self._buffer += data
            head, blank, data = bytes(self._buffer).partition(b"\r\n\r\n")
            if not blank:
                return
            self._read_head(head)
        try:
            piece = self._body.feed(data)
        except ValueError as error:
            self._end(f"malformed body: {error}")
            return
        if self._is_stream:
            self._text += piece.replace(b"\r\n", b"\n")
            *events, rest = bytes(self._text).split(b"\n\n")
            self._text = bytearray(rest)
            for event in events:
                payload = b"\n".join(
                    line[5:].removeprefix(b" ")
                    for line in event.split(b"\n")
                    if line.startswith(b"data:")
                )
                if payload:  # not a comment
                    self.response.events.append((now, payload))
        else:
            self.response.body += piece
        if self._body.ended:
            self._end("")

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, also of a body without a declared length."""
        if self._head_read and self._body.ends_with_connection and exc is None:
            self._end("")
        else:
            self._end(f"the connection broke: {exc or 'closed by the server'}")

    def _read_head(self, head: bytes) -> None:
        self._head_read = True
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(":") for line in lines)
        }
        words = status_line.split(" ", 2)
        self.response.status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        length = headers.get("content-length")
        self._body = BodyDecoder(
            chunked=headers.get("transfer-encoding", "").endswith("chunked"),
            length=int(length) if length is not None and length.isdigit() else None,
        )

    def _end(self, error: str) -> None:
        if self.done.done():
            return
        self.response.complete = not error
        self.response.error = error
        self.response.ended_s = time.monotonic()
        self.done.set_result(None)


class BodyDecoder:
    """The bytes of a body, out of its transfer coding, as they come.

    Args:
        chunked: the body comes in chunks that tell their size.
        length: bytes of an unchunked body; None if it ends with the connection.

    Attributes:
        ended: all of it was fed.
    """

    def __init__(self, *, chunked: bool = False, length: int | None = None) -> None:
        self.ended = length == 0 and not chunked
        self.ends_with_connection = length is None and not chunked
        self._chunked = chunked
        self._left = length  # of the body, or of the current chunk
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in these bytes of the connection.

        Raises:
            ValueError: a chunk's size is not a hexadecimal number.
        """
        if self._chunked:
            return self._feed_chunks(data)
        if self._left is None:
            return data
        piece = data[: self._left]
        self._left -= len(piece)
        self.ended = self._left == 0
        return piece

    def _feed_chunks(self, data: bytes) -> bytes:
        buffer = self._buffer + data
        pieces = []
        while not self.ended:
            size_line, newline, rest = buffer.partition(b"\r\n")
            if not newline:
                break
            size = int(size_line.partition(b";")[0], 16)
            if size == 0:
                self.ended = True
            elif len(rest) < size + 2:
                break  # a chunk counts when it is whole: servers send an event a chunk
            else:
                pieces.append(rest[:size])
                buffer = rest[size + 2 :]
        self._buffer = buffer
        return b"".join(pieces)
