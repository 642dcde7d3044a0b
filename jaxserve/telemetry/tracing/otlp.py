"""Our spans as OpenTelemetry's, and the exporter that a configuration asks for.

The only module that imports OpenTelemetry, which takes half a second: it is imported in the
observer's process, and only where there is a collector to send to.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from jaxserve.config_observing import TracingConfig
from jaxserve.telemetry import semconv
from jaxserve.telemetry.tracing.settings import http_endpoint, pairs
from jaxserve.telemetry.tracing.spans import Place, Span

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_FINE = Status(StatusCode.UNSET)


class _ProcessResource(Resource):
    """There is one for each process, so it is known by what it is and not by what it says.

    Spans are grouped by it: comparing the text took a quarter of the time that encoding them took.
    """

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Sender:
    """Sends spans to the configured collector. `send` blocks, for at most `tracing.timeout_s`.

    Args:
        instance: unique to this server, for as long as it runs.
    """

    def __init__(self, config: TracingConfig, instance: str) -> None:
        self._translator = Translator(config, instance)
        self._exporter = _exporter(config)

    def send(self, spans: Sequence[Span], offset_ns: int) -> bool:
        """Whether the collector took them."""
        readable = [self._translator.readable(span, offset_ns) for span in spans]
        return self._exporter.export(readable) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """Ends what `send` may still be waiting for."""
        self._exporter.shutdown()


class Translator:
    """Makes OpenTelemetry's spans, each with the resource of the process that it is about."""

    def __init__(self, config: TracingConfig, instance: str) -> None:
        self._common = {
            semconv.SERVICE_NAME: config.service_name,
            semconv.SERVICE_VERSION: _version(),
            semconv.SERVICE_INSTANCE: instance,
            semconv.HOST_NAME: socket.gethostname(),
            **pairs("tracing.attributes", config.attributes),
        }
        self._resources: dict[tuple[Place, int], Resource] = {}
        self._scope = InstrumentationScope("jaxserve", _version(), semconv.SCHEMA_URL)

    def readable(self, span: Span, offset_ns: int) -> ReadableSpan:
        """One span.

        Args:
            offset_ns: of the wall clock.
        """
        state = TraceState.from_header([span.tracestate]) if span.tracestate else None
        trace_id = int(span.trace_id, 16)
        parent = None
        if span.parent_id:
            flags = TraceFlags(span.flags) if span.is_request else _SAMPLED
            parent = SpanContext(trace_id, int(span.parent_id, 16), span.is_request, flags, state)
        return ReadableSpan(
            name=span.name,
            context=SpanContext(trace_id, int(span.span_id, 16), False, _SAMPLED, state),
            parent=parent,
            resource=self._resource(span.place, span.pid),
            attributes=span.attributes,  # pyright: ignore[reportArgumentType]
            kind=SpanKind.SERVER if span.is_request else SpanKind.INTERNAL,
            status=_FINE if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.start_ns + offset_ns,
            end_time=span.end_ns + offset_ns,
            instrumentation_scope=self._scope,
        )

    def _resource(self, place: Place, pid: int) -> Resource:
        resource = self._resources.get((place, pid))
        if resource is None:
            if len(self._resources) > 100:  # an engine has died again and again
                self._resources.clear()
            about = self._common | {"jaxserve.process": place.value}
            if pid:
                about |= {semconv.PROCESS_PID: pid}
            resource = _ProcessResource(about, semconv.SCHEMA_URL)
            self._resources[place, pid] = resource
        return resource


def _exporter(config: TracingConfig) -> SpanExporter:
    # It says each failure in its own words, several times a second; `export` says it once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    headers = pairs("tracing.headers", config.headers)
    if config.protocol == "grpc":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(
            config.endpoint,
            insecure=config.endpoint.startswith("http://"),
            headers={name.lower(): value for name, value in headers.items()},
            timeout=config.timeout_s,
        )
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    return trace_exporter.OTLPSpanExporter(
        http_endpoint(config.endpoint), headers=headers, timeout=config.timeout_s
    )


def _version() -> str:
    try:
        return version("jaxserve")
    except PackageNotFoundError:
        return "0"
