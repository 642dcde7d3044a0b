"""Routes whose answer the observer has: its parts' documents, and their metrics."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from jaxserve.errors import Overloaded
from jaxserve.http.auth import Identity
from jaxserve.http.frontend import Frontend
from jaxserve.http.metrics import CONTENT_TYPE, END, OPEN_CONTENT_TYPE, wants_open
from jaxserve.http.observer.messages import Question
from jaxserve.http.observer.observer import METRICS, OPEN_METRICS
from jaxserve.http.observer.reporter import NoReporter

#: How long a scrape waits for the observer; and one that did not answer is not waited for again
#: for so long, so that a hang there costs those who scrape little.
_SCRAPE_S = 2.0
_HUNG_S = 10.0
_DOWN = b"""\
# HELP jaxserve_observer_up 1 if the observer answered
# TYPE jaxserve_observer_up gauge
jaxserve_observer_up 0.0
"""


class Observed:
    """ASGI: passes a client's question on to the observer.

    Args:
        name: of the question.
    """

    def __init__(self, frontend: Frontend, name: str) -> None:
        self._frontend = frontend
        self._name = name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request; raises what the error table answers."""
        identity: Identity = scope["jaxserve.identity"]
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        if b"text/csv" in dict(scope["headers"]).get(b"accept", b""):
            query.setdefault("format", "csv")
        question = Question(
            id=0,
            name=self._name,
            query=query,
            tenant=identity.tenant,
            admin=identity.admin,
        )
        answer = await self._frontend.reporter.ask(question)
        await _send(send, answer.status, answer.content_type.encode(), answer.body)


class PrometheusMetrics:
    """/metrics: of the workers and the engine, and behind them of the observer's parts.

    As OpenMetrics where the Accept header asks for that, as Prometheus' own does.
    """

    def __init__(self, frontend: Frontend, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._frontend = frontend
        self._clock_s = clock_s
        self._hung_until_s = -math.inf

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers in Prometheus' text format, or as OpenMetrics."""
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
        is_open = wants_open(accept.decode("latin-1"))
        body = self._frontend.metrics.render(is_open=is_open)
        if type(self._frontend.reporter) is not NoReporter:
            body += await self._observed(is_open=is_open)
        if is_open:
            await _send(send, 200, OPEN_CONTENT_TYPE, body + END)
        else:
            await _send(send, 200, CONTENT_TYPE, body)

    async def _observed(self, *, is_open: bool) -> bytes:
        if self._clock_s() < self._hung_until_s:
            return _DOWN
        question = Question(id=0, name=OPEN_METRICS if is_open else METRICS, admin=True)
        try:
            async with asyncio.timeout(_SCRAPE_S):
                answer = await self._frontend.reporter.ask(question)
        except TimeoutError:
            self._hung_until_s = self._clock_s() + _HUNG_S
            return _DOWN
        except Overloaded:
            return _DOWN
        return answer.body if answer.status == 200 else _DOWN


async def _send(send: Any, status: int, content_type: bytes, body: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
