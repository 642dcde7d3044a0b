"""The ASGI application: routes, and what stands around them.

    Arrival (stamps the time, counts) → CORS → Authentication → Refusals (errors) → routes

`Arrival` is outermost, so TTFT starts before the body is read; CORS is outside of what refuses, so
that browsers may read refusals. Pure ASGI throughout: no middleware buffers a stream.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from jaxserve.config import (
    EmbeddingsConfig,
    HttpConfig,
    LimitsConfig,
    MeteringConfig,
    StructuredConfig,
    ToolsConfig,
    TracingConfig,
)
from jaxserve.errors import InvalidRequest, JaxserveError
from jaxserve.http.adapters import Adapters, LoadAdapter, UnloadAdapter
from jaxserve.http.auth import Authentication, KeyRing
from jaxserve.http.chat import read_chat
from jaxserve.http.completions import read_completion
from jaxserve.http.console import PATHS as CONSOLE_PATHS
from jaxserve.http.console import ConsoleFile
from jaxserve.http.costs import COST_HEADER, LIMIT_HEADER, RESET_HEADER, SPENT_HEADER, Costs
from jaxserve.http.embeddings import EMBEDDINGS
from jaxserve.http.errors import MethodNotAllowed, NotFound, error_body, send_error
from jaxserve.http.frontend import Frontend
from jaxserve.http.gate import CAPPED_HEADER, Gate
from jaxserve.http.generate import GenerationEndpoint
from jaxserve.http.grammars import GrammarChecker
from jaxserve.http.metrics import Metrics
from jaxserve.http.observed import Observed, PrometheusMetrics
from jaxserve.http.observer.reporter import NoReporter, Reporter
from jaxserve.http.probes import Health, Models, Ready
from jaxserve.http.records import (
    LEFT,
    WORK_ROUTES,
    close_record,
    note_context,
    note_error,
    open_record,
)
from jaxserve.http.responses import read_response
from jaxserve.http.score import RERANK, SCORE
from jaxserve.http.settling import Settling
from jaxserve.http.texts import TextsEndpoint
from jaxserve.http.tokens import TokensEndpoint, detokenize, tokenize
from jaxserve.limits.store import Store
from jaxserve.protocol.client import EngineClient
from jaxserve.protocol.records import RequestRecord
from jaxserve.protocol.stream import Stream
from jaxserve.text.dialect import make_dialect
from jaxserve.text.embedding import EmbeddingText
from jaxserve.text.template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.vocabulary import vocabulary_of

logger = logging.getLogger(__name__)

#: Characters of an unknown path that an error repeats.
_SHOWN_PATH = 100
#: Headers that pages of other origins may read, besides the few that they always may.
_EXPOSED = [
    *("retry-after", "retry-after-ms", CAPPED_HEADER.decode(), "x-request-id", "traceparent"),
    *(name.decode() for name in (COST_HEADER, LIMIT_HEADER, SPENT_HEADER, RESET_HEADER)),
    *(
        f"x-ratelimit-{name}-{kind}"
        for name in ("limit", "remaining", "reset")
        for kind in ("requests", "tokens")
    ),
]


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    config: HttpConfig,
    *,
    page_size: int,
    keys: KeyRing | None = None,
    metrics: Metrics | None = None,
    limits: LimitsConfig | None = None,
    store: Store | None = None,
    tools: ToolsConfig | None = None,
    structured: StructuredConfig | None = None,
    embeddings: EmbeddingText | None = None,
    embeddings_config: EmbeddingsConfig | None = None,
    adapters: Adapters | None = None,
    reporter: Reporter | None = None,
    tracing: TracingConfig | None = None,
    metering: MeteringConfig | None = None,
) -> Arrival:
    """The application over a client that has been started.

    Args:
        template: None where the model has no chat template.
        page_size: tokens a KV page.
        keys: none are asked for where None.
        metrics: of this process; its own where None.
        limits: of admission; the defaults where None.
        store: of rate limits; None where no key has any.
        tools: how messages are read; the defaults where None.
        structured: what grammars may take; the defaults where None.
        embeddings: the text half of the model that embeds; None where there is none.
        embeddings_config: limits of its requests; the defaults where None.
        adapters: LoRA adapters by name; None where there are none.
        reporter: where the records of requests go; nowhere where None.
        tracing: which requests are traced; the defaults where None.
        metering: prices; the defaults where None. Costs are told only where there is a reporter.
    """
    metering = metering or MeteringConfig()
    metrics = metrics or Metrics(lambda: client.status, page_size=page_size)
    tracing = tracing or TracingConfig()
    watched = reporter is not None
    reporter = reporter or NoReporter()

    def ended(record: RequestRecord) -> None:
        metrics.ended(record)
        frontend.reporter.ended(record)

    frontend = Frontend(
        client=client,
        tokenizer=tokenizer,
        template=template,
        dialect=make_dialect(template, tokenizer, tools or ToolsConfig()),
        config=config,
        keys=keys or KeyRing(),
        gate=Gate(client, limits or LimitsConfig(), metrics, store, config.workers),
        metrics=metrics,
        grammars=GrammarChecker(structured or StructuredConfig(), lambda: vocabulary_of(tokenizer)),
        page_size=page_size,
        started_s=int(time.time()),
        embeddings=embeddings,
        embeddings_config=embeddings_config or EmbeddingsConfig(),
        adapters=adapters or Adapters(),
        reporter=reporter,
        record_content=tracing.record_content,
        settling=Settling(ended),
        costs=Costs(metering, reporter.told, enabled=metering.enabled and watched),
    )
    post, get = ["POST"], ["GET"]
    router = Router(
        routes=[
            Route("/v1/chat/completions", GenerationEndpoint(frontend, read_chat), methods=post),
            Route("/v1/completions", GenerationEndpoint(frontend, read_completion), methods=post),
            Route("/v1/responses", GenerationEndpoint(frontend, read_response), methods=post),
            Route("/v1/embeddings", TextsEndpoint(frontend, EMBEDDINGS), methods=post),
            Route("/v1/score", TextsEndpoint(frontend, SCORE), methods=post),
            Route("/v1/rerank", TextsEndpoint(frontend, RERANK), methods=post),
            Route("/v1/models", Models(frontend), methods=get),
            Route("/v1/models/{name:path}", Models(frontend), methods=get),
            Route("/v1/load_lora_adapter", LoadAdapter(frontend), methods=post),
            Route("/v1/unload_lora_adapter", UnloadAdapter(frontend), methods=post),
            Route("/tokenize", TokensEndpoint(frontend, tokenize), methods=post),
            Route("/detokenize", TokensEndpoint(frontend, detokenize), methods=post),
            Route("/health", Health(frontend), methods=get),
            Route("/live", Health(frontend), methods=get),
            Route("/ready", Ready(frontend), methods=get),
            Route("/v1/usage", Observed(frontend, "usage"), methods=get),
            Route("/v1/costs", Observed(frontend, "costs"), methods=get),
            Route("/v1/alerts", Observed(frontend, "alerts"), methods=get),
            Route("/v1/baselines", Observed(frontend, "baselines"), methods=get),
            Route("/metrics", PrometheusMetrics(frontend), methods=get),
            Route("/slo", Observed(frontend, "slo"), methods=get),
            Route("/console/data", Observed(frontend, "console"), methods=get),
            Route("/console/request", Observed(frontend, "request"), methods=get),
            *(Route(path, ConsoleFile(path), methods=get) for path in CONSOLE_PATHS),
        ],
        redirect_slashes=False,
    )
    app: Any = Authentication(Refusals(router), frontend.keys)
    if config.cors_origins:
        app = Cors(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
            max_age=600,
        )
    return Arrival(app, frontend, tracing)


class Cors(CORSMiddleware):
    """Starlette's, its refusals with our error body."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks beforehand."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = InvalidRequest(bytes(response.body).decode())
        headers = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
        return JSONResponse(error_body(error), response.status_code, headers)


class Refusals:
    """ASGI: turns what a route raised into an error response, if none has begun."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes the request on."""
        try:
            await self._app(scope | {"app": self}, receive, send)
        except JaxserveError as error:
            note_error(scope, error)
            await send_error(send, error)
        except HTTPException as error:  # the router's own
            refusal = _routing_error(scope, error)
            note_error(scope, refusal)
            await send_error(send, refusal)


class Arrival:
    """ASGI, outermost: when a request came, that it is here, and how it was answered.

    Attributes:
        frontend: what the endpoints share; `frontend.idle()` waits for all requests to end.
    """

    def __init__(self, app: Any, frontend: Frontend, tracing: TracingConfig) -> None:
        self.frontend = frontend
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        record = open_record(scope["path"])
        scope["jaxserve.arrived_ns"] = record.arrived_ns
        scope["jaxserve.record"] = record
        streams: list[Stream] = []
        scope["jaxserve.streams"] = streams
        added: dict[bytes, bytes] = {b"x-request-id": record.request_id.encode()}
        if record.route in WORK_ROUTES:
            note_context(record, scope, self._tracing)
            added[b"traceparent"] = record.traceparent.encode()
        scope["jaxserve.headers"] = added
        frontend = self.frontend
        status = 0

        async def send_counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if frontend.draining:
                    added[b"connection"] = b"close"
                message = message | {"headers": [*message["headers"], *added.items()]}
            await send(message)

        frontend.enter()
        frontend.metrics.in_flight(1)
        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            logger.exception("a request failed")
            error = JaxserveError("internal error; see the log")
            note_error(scope, error)
            if not status:
                await send_error(send_counted, error)
        finally:
            frontend.leave()
            frontend.metrics.in_flight(-1)
            frontend.metrics.request(_route_of(scope["path"]), status or LEFT)
            close_record(record, status or LEFT)
            if record.route in WORK_ROUTES:
                frontend.settling.settle(record, streams)


def _route_of(path: str) -> str:
    """A path as a metric's label."""
    return "/v1/models/{name}" if path.startswith("/v1/models/") else path


def _routing_error(scope: Any, error: HTTPException) -> JaxserveError:
    path = scope["path"]
    path = path if len(path) <= _SHOWN_PATH else path[:_SHOWN_PATH] + "…"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return MethodNotAllowed(f"{path} does not take {scope['method']}", allowed)
    return NotFound(f"there is no {path} here")
