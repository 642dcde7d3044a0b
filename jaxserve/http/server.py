"""uvicorn, drained our way: on SIGTERM new work is refused by name while streams go on.

uvicorn alone would close its listening socket first, and leave new clients waiting in the queue
that the workers share. Here the application answers 503 until the last stream has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Callable, Iterator
from socket import socket

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxserve.config import HttpConfig
from jaxserve.errors import Overloaded
from jaxserve.http.app import Arrival

logger = logging.getLogger(__name__)

#: Of a request's line and headers together.
MAX_HEAD_BYTES = 65_536
#: After the last stream, connections get this long to take in what was written.
CLOSING_S = 5


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit on a request's head, which it would collect without one."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Answers 431 and closes when a head goes on beyond the limit."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_head_too_large())
            self.transport.close()

    def on_headers_complete(self) -> None:
        """What follows is the body's matter."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next head begins."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()


def _head_too_large() -> bytes:
    error = {
        "message": f"the request line and headers are over {MAX_HEAD_BYTES} bytes",
        "type": "invalid_request_error",
        "param": None,
        "code": "header_too_large",
    }
    body = json.dumps({"error": error}).encode()
    head = (
        "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Server(uvicorn.Server):
    """Serves one application on a socket that is already bound.

    Args:
        on_started: called once connections are accepted.
    """

    def __init__(self, app: Arrival, config: HttpConfig, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=CLOSING_S,
                ssl_certfile=config.tls_certificate or None,
                ssl_keyfile=config.tls_key or None,
            )
        )
        self._frontend = app.frontend
        self._drain_timeout_s = config.drain_timeout_s
        self._on_started = on_started
        self._drain: asyncio.Task[None] | None = None

    async def run_on(self, listener: socket, stop: Callable[[], None]) -> None:
        """Serves until SIGTERM and the end of what then runs; a second SIGTERM calls `stop`."""

        def on_sigterm() -> None:
            if self._drain is not None:
                stop()
            else:
                self._drain = asyncio.create_task(self.drain(), name="jaxserve drain")

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_sigterm)
        await self.serve(sockets=[listener])

    async def drain(self) -> None:
        """Refuses new work, waits for the old within `http.drain_timeout_s`, then ends serving."""
        frontend = self._frontend
        frontend.draining = True
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await frontend.idle()
        except TimeoutError:
            logger.warning("%d requests are cut off by the end", frontend.num_requests)
            frontend.client.fail(Overloaded("the server was shut down before this was done"))
        self.should_exit = True

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """As uvicorn's, and says so."""
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `run_on`."""
        yield
