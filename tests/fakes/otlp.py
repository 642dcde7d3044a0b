"""Real OTLP receivers on loopback, over gRPC and over HTTP, that can be slow or refuse."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(kw_only=True)
class Seen:
    """One span as it came over the wire."""

    resource: dict[str, Any]
    scope: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    kind: int
    status: int
    flags: int
    state: str
    attributes: dict[str, Any]


@dataclass
class Receiver:
    """What came, and how the receiver behaves.

    Attributes:
        refuses: whether it says that it is not available.
        open: cleared, it holds each call until it is set again.
        came: set when something came.
    """

    endpoint: str = ""
    spans: list[Seen] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    refuses: bool = False
    open: threading.Event = field(default_factory=threading.Event)
    num_calls: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.open.set()

    def take(self, body: bytes, headers: dict[str, str]) -> bool:
        """Takes one export; whether it was taken."""
        with self.changed:
            self.num_calls += 1
            self.changed.notify_all()
        self.open.wait()
        if self.refuses:
            return False
        request = ExportTraceServiceRequest.FromString(body)
        with self.changed:
            self.headers.append(headers)
            for group in request.resource_spans:
                resource = values(group.resource.attributes)
                for scoped in group.scope_spans:
                    self.spans += [seen(resource, scoped.scope.name, s) for s in scoped.spans]
            self.changed.notify_all()
        return True

    def wait_for(self, num_spans: int, timeout_s: float = 30) -> list[Seen]:
        """Waits until so many spans came; all that came."""
        with self.changed:
            enough = self.changed.wait_for(lambda: len(self.spans) >= num_spans, timeout_s)
            assert enough, f"{len(self.spans)} spans came"
            return list(self.spans)

    def wait_for_calls(self, num_calls: int, timeout_s: float = 30) -> None:
        """Waits until so many calls have begun."""
        with self.changed:
            enough = self.changed.wait_for(lambda: self.num_calls >= num_calls, timeout_s)
            assert enough, f"{self.num_calls} calls came"


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as Python has them."""
    return {pair.key: value(pair.value) for pair in attributes}


def value(given: Any) -> Any:
    """One value."""
    kind = given.WhichOneof("value")
    if kind == "array_value":
        return [value(item) for item in given.array_value.values]
    return getattr(given, kind)


def seen(resource: dict[str, Any], scope: str, span: Any) -> Seen:
    """One span."""
    return Seen(
        resource=resource,
        scope=scope,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        kind=span.kind,
        status=span.status.code,
        flags=span.flags,
        state=span.trace_state,
        attributes=values(span.attributes),
    )


@contextmanager
def grpc_receiver(port: int = 0) -> Iterator[Receiver]:
    """A receiver over gRPC."""
    receiver = Receiver()

    class Service(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
            headers = dict(context.invocation_metadata())
            if not receiver.take(request.SerializeToString(), headers):
                context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(Service(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    assert bound
    receiver.endpoint = f"http://127.0.0.1:{bound}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.open.set()
        server.stop(None).wait()


@contextmanager
def http_receiver(port: int = 0) -> Iterator[Receiver]:
    """A receiver over HTTP, protobuf."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            headers = {name.lower(): given for name, given in self.headers.items()}
            taken = receiver.take(body, headers | {"path": self.path})
            self.send_response(200 if taken else 503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hung up is none of ours."""

    server = Server(("127.0.0.1", port), Handler)
    receiver.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.open.set()
        server.shutdown()
        thread.join()
        server.server_close()


RECEIVERS = {"grpc": grpc_receiver, "http": http_receiver}
