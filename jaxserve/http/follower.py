"""`serve` on a host other than number 0: keeps an engine running, and says over HTTP how it is.

    host 0       serve ─┬─ engine ◀──────┐
                        └─ HTTP workers  │ plans (device/hosts.py)
    host 1 …     serve ─── engine ◀──────┘
                   └─ /live, /ready

The loss of one host ends the engines of all. Each host's `serve` starts its own again, and they
meet as they did at first; here, without end. The probes are answered in this process, which has
nothing else to do, and by the engine's own word (`engine.greeter`).
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import Any

from jaxserve.config import Config
from jaxserve.http.errors import MethodNotAllowed, NotFound, send_error, send_json
from jaxserve.http.probes import engine_card, progress_card
from jaxserve.http.restarts import Backoff, describe_end, ended, may_restart, waited
from jaxserve.http.server import PlainServer
from jaxserve.protocol.client import EngineClient
from jaxserve.protocol.spawn import EngineProcess
from jaxserve.protocol.zmq import ZmqClient

LIVE, READY = ("/live", "/health"), "/ready"


async def run_follower(config: Config, listener: socket.socket, engine_module: str) -> int:
    """Follows host 0 until SIGTERM or SIGINT.

    Args:
        listener: bound to `http.port`.

    Returns:
        The exit status: 0 after a signal, 1 after an error that was told.
    """
    follower = Follower(config, engine_module)
    server = PlainServer(follower, config.http)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    scheme = "https" if config.http.tls_certificate else "http"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    sys.stdout.write(
        f"/live and /ready of host {config.parallel.host} on {scheme}://{host}:{port}\n"
    )
    sys.stdout.flush()
    try:
        return await follower.run()
    finally:
        server.should_exit = True
        await serving


class Follower:
    """Starts an engine again and again; as an ASGI application, tells how the present one is."""

    def __init__(self, config: Config, engine_module: str) -> None:
        self._config = config
        self._engine_module = engine_module
        self._client: EngineClient | None = None  # None between two lives

    async def run(self) -> int:
        """Keeps an engine running; returns the exit status."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        backoff = Backoff(self._config.engine.restart_backoff_s)
        while True:
            backoff.started()
            engine = EngineProcess.start(self._config, module=self._engine_module)
            try:
                await self._live(engine, stopping)
                status = engine.poll()
            finally:
                engine.stop()
            if stopping.is_set():
                return 0
            assert status is not None, "its pidfd said that it has ended"
            if not may_restart(status):
                return 1
            sys.stderr.write(f"jaxserve: {describe_end(status)}; it is started again\n")
            if await waited(stopping, backoff.next_pause_s()):
                return 0

    async def _live(self, engine: EngineProcess, stopping: asyncio.Event) -> None:
        """Listens to an engine until it ends, or is to."""
        client = EngineClient(ZmqClient(engine.address))
        await client.start()
        self._client = client
        end = asyncio.create_task(ended(engine.pid))
        stop = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([end, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._client = None
            for task in (end, stop):
                task.cancel()
            await asyncio.gather(end, stop, return_exceptions=True)
            await client.close()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a probe."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path != READY and path not in LIVE:
            host = self._config.parallel.host
            await send_error(send, NotFound(f"host {host} serves probes only: ask host 0"))
        elif scope["method"] not in ("GET", "HEAD"):
            refusal = f"{path} does not take {scope['method']}"
            await send_error(send, MethodNotAllowed(refusal, "GET, HEAD"))
        elif path == READY:
            document = self._readiness()
            await send_json(send, document, status=200 if document["status"] == "ready" else 503)
        else:
            await send_json(send, self._liveness())

    def _liveness(self) -> dict[str, Any]:
        """That this process answers is all that is asked; it starts its engine again itself."""
        client = self._client
        engine = engine_card(client.status if client else None, None)
        if client is None:
            engine["state"] = "restarting"
        return {"status": "ok", "host": self._config.parallel.host, "engines": [engine]}

    def _readiness(self) -> dict[str, Any]:
        """Ready: it has met the others, compiled, and makes host 0's calls as they come."""
        document = {"status": "starting", "host": self._config.parallel.host}
        client = self._client
        if client is None or client.error is not None:
            return document | {"status": "restarting"}
        status, progress = client.status, client.progress
        if status is None:
            return document
        if status.state != "ready":
            told = {} if progress is None else {"progress": progress_card(progress)}
            return document | {"status": status.state} | told
        if status.step_age_s > self._config.engine.step_timeout_s:
            return document | {"status": "behind", "behind_s": round(status.step_age_s, 3)}
        return document | {"status": "ready"}
