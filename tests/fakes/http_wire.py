"""HTTP/1.1 on asyncio's streams, no more than tests of many requests need: heads and bodies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

#: Changes the headers of a request that is forwarded.
Rewrite = Callable[[dict[str, str]], None]


@dataclass
class Message:
    """A request or a response: its first line, headers by lower-case name, and its body."""

    first: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def encode(self) -> bytes:
        """As it is sent."""
        lines = [self.first, *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.body


async def read_message(reader: asyncio.StreamReader) -> Message:
    """The next one on a connection; its body has a length.

    Raises:
        EOFError: the connection has ended.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head[:-4].split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return Message(first, headers, await reader.readexactly(int(headers["content-length"])))


@asynccontextmanager
async def forwarding_proxy(port: int, rewrite: Rewrite) -> AsyncIterator[int]:
    """A proxy to a port of this machine, one connection there for each that comes; its port.

    Args:
        rewrite: changes the headers of each request.
    """

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                request = await read_message(reader)
                rewrite(request.headers)
                there[1].write(request.encode())
                response = await read_message(there[0])
                writer.write(response.encode())
        except (EOFError, ConnectionError):
            pass  # one end has hung up
        finally:
            writer.close()
            there[1].close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0, backlog=2048)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
