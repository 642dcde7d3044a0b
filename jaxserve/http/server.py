"""uvicorn, drained our way: on SIGTERM new work is refused by name while streams go on.

uvicorn alone would close its listening socket first, and leave new clients waiting in the queue
that the workers share. Here the application answers 503 until the last stream has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from socket import socket
from typing import Any

import uvicorn

from jaxserve.config import HttpConfig
from jaxserve.errors import Overloaded
from jaxserve.http.app import Arrival
from jaxserve.http.protocol import BoundedProtocol

logger = logging.getLogger(__name__)

#: After the last stream, connections get this long to take in what was written.
CLOSING_S = 5


class PlainServer(uvicorn.Server):
    """uvicorn with our protocol and settings, which leaves signals alone."""

    def __init__(self, app: Any, config: HttpConfig) -> None:
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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes none."""
        yield


class Server(PlainServer):
    """Serves one application on a socket that is already bound.

    Args:
        on_started: called once connections are accepted.
    """

    def __init__(self, app: Arrival, config: HttpConfig, on_started: Callable[[], None]) -> None:
        super().__init__(app, config)
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
        frontend.drain()
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
