"""An HTTP endpoint that takes alerts, for PagerDuty, Slack and webhooks alike.

Runs in a thread; what it answers, and whether it is there at all, can be changed.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class AlertReceiver:
    """From `with` to its end.

    Attributes:
        port: on loopback; the same after `stop` and `start`.
        bodies: of what was taken, as JSON; headers and paths of the same.
        statuses: answers to come, oldest first; after them 202 for PagerDuty's path, else 200.
        num_refused: requests that were answered with one of `statuses`.
        before_answer: is called when a body has been taken.
    """

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.statuses: list[int] = []
        self.num_refused = 0
        self.before_answer: Callable[[], None] | None = None
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """It is there."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner._take(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """It is away: connections are refused."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = None

    def _take(self, request: BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers["content-length"]))
        status = 202 if request.path == "/v2/enqueue" else 200
        answer = b"ok"
        if self.statuses:
            status = self.statuses.pop(0)
            self.num_refused += 1
        else:
            body = json.loads(raw)
            self.bodies.append(body)
            self.raw.append(raw)
            self.headers.append({k.lower(): v for k, v in request.headers.items()})
            self.paths.append(request.path)
            if self.before_answer is not None:
                self.before_answer()
            if request.path == "/v2/enqueue":
                answer = json.dumps(
                    {"status": "success", "message": "x", "dedup_key": body["dedup_key"]}
                ).encode()
        with contextlib.suppress(ConnectionError):  # whoever asked has died meanwhile
            self._answer(request, status, answer)

    def _answer(self, request: BaseHTTPRequestHandler, status: int, answer: bytes) -> None:
        request.send_response(status)
        if status == 429:
            request.send_header("retry-after", "7")
        if status == 302:
            request.send_header("location", f"{self.url}/elsewhere")
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)
