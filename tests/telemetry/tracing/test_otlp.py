"""Spans at real OTLP receivers, over gRPC and over HTTP."""

from __future__ import annotations

import os
import socket

import pytest

from jaxserve.config import TracingConfig
from jaxserve.errors import ConfigError
from jaxserve.protocol.records import Outcome
from jaxserve.telemetry.tracing import export as module
from jaxserve.telemetry.tracing.export import Export
from jaxserve.telemetry.tracing.otlp import Sender
from jaxserve.telemetry.tracing.settings import check_tracing, http_endpoint
from jaxserve.telemetry.tracing.spans import spans_of
from tests.fakes.otlp import RECEIVERS, Receiver
from tests.telemetry.tracing.records import PARENT, SPAN, TRACE, record, sequence

OFFSET_NS = 1_700_000_000_000_000_000
PROTOCOLS = pytest.mark.parametrize("protocol", ["grpc", "http"])


def config_for(receiver: Receiver, protocol: str, **values) -> TracingConfig:
    """The configuration that sends there."""
    given = TracingConfig(endpoint=receiver.endpoint, protocol=protocol, **values)
    check_tracing(given)
    return given


@PROTOCOLS
def test_a_request_comes_over_as_it_was(protocol: str) -> None:
    with RECEIVERS[protocol]() as receiver:
        config = config_for(
            receiver,
            protocol,
            headers=("X-Key=s3cret=1", "x-other= b "),
            attributes=("deployment.environment.name=prod",),
            service_name="front",
        )
        sender = Sender(config, "instance-1")
        whole = record(
            parent_id=PARENT,
            trace_flags=1,
            tracestate="v=1",
            outcome=Outcome.FAILED,
            error="it broke",
            error_code="engine_failure",
            sequences=[sequence()],
        )
        assert sender.send(spans_of(whole), OFFSET_NS)
        sender.close()
        spans = receiver.wait_for(9)
        headers = receiver.headers[0]
    assert (headers["x-key"], headers["x-other"]) == ("s3cret=1", "b")
    if protocol == "http":
        assert headers["path"] == "/v1/traces"
    root = spans[0]
    assert (root.name, root.trace_id, root.span_id) == ("chat smol", TRACE, SPAN)
    assert root.parent_id == PARENT and root.kind == 2 and root.state == "v=1"
    assert root.status == 2 and root.flags == 0x300  # its parent is elsewhere
    assert (root.start_ns, root.end_ns) == (OFFSET_NS + 100, OFFSET_NS + 2000)
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert root.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert root.scope == "jaxserve"
    for span in spans:
        resource = span.resource
        assert (resource["service.name"], resource["service.instance.id"]) == (
            "front",
            "instance-1",
        )
        assert resource["deployment.environment.name"] == "prod"
        in_engine = span.name in ("queue", "prefill", "decode")
        assert resource["jaxserve.process"] == ("engine" if in_engine else "http")
        assert resource.get("process.pid") == (4711 if in_engine else None)
        if span is not root:
            assert span.kind == 1 and span.parent_id == SPAN and span.flags == 0x100


@PROTOCOLS
def test_a_collector_that_refuses_is_an_answer_and_not_an_error(protocol: str) -> None:
    with RECEIVERS[protocol]() as receiver:
        receiver.refuses = True
        sender = Sender(config_for(receiver, protocol, timeout_s=0.5), "1")
        assert not sender.send(spans_of(record()), 0)
        sender.close()


@PROTOCOLS
def test_a_collector_that_is_dead_and_comes_back(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LINGER_S", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = TracingConfig(
        endpoint=f"http://127.0.0.1:{port}",
        protocol=protocol,
        timeout_s=0.3,
        headers=("authorization=Bearer s3cret",),
    )
    sender = Sender(config, "1")
    export = Export(sender.send, sender.close, 90, config.endpoint, pause_s=0.05)
    export.start()
    for number in range(100):
        export.offer(spans_of(record(trace_id=f"{number + 1:032x}")), 0)
    assert export.dropped["full"] >= 9 * 80
    with RECEIVERS[protocol](port) as receiver:
        receiver.wait_for(9)
        export.close(20)
        sender.close()
        assert f"{100:032x}" in {s.trace_id for s in receiver.spans}  # the newest was kept
        assert export.num_sent == len(receiver.spans)
        assert export.num_sent + sum(export.dropped.values()) == 900
    assert "s3cret" not in caplog.text


@PROTOCOLS
def test_a_collector_that_holds_a_call_holds_nobody_else(protocol: str) -> None:
    with RECEIVERS[protocol]() as receiver:
        receiver.open.clear()
        sender = Sender(config_for(receiver, protocol), "1")
        export = Export(sender.send, sender.close, 90, receiver.endpoint)
        export.start()
        export.offer(spans_of(record()), 0)
        receiver.wait_for_calls(1)
        for _ in range(100):
            export.offer(spans_of(record()), 0)  # at once
        assert export.num_waiting == 90 and export.dropped["full"] == 9 * 91
        receiver.open.set()
        export.close(20)
        sender.close()
        assert export.num_sent == len(receiver.spans) == 90


def test_the_environment_cannot_change_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    with RECEIVERS["http"]() as receiver:
        sender = Sender(config_for(receiver, "http"), "1")
        assert sender.send(spans_of(record()), 0)
        sender.close()
    assert os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"endpoint": "collector:4317"}, "http://HOST:PORT"),
        ({"endpoint": "grpc://c:4317"}, "http://HOST:PORT"),
        ({"endpoint": "http://c:99999"}, "http://HOST:PORT"),
        ({"endpoint": "http://"}, "http://HOST:PORT"),
        ({"endpoint": "http://c:4317/v1/traces"}, "tracing.protocol=http"),
        ({"endpoint": "http://me:pw@c:4317"}, "tracing.headers"),
        ({"headers": ("a=b", "s3cret")}, "number 2"),
        ({"headers": ("a=s3cret\n",)}, "number 1"),
        ({"attributes": ("=x",)}, "name=value"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(values, says) -> None:
    with pytest.raises(ConfigError) as told:
        check_tracing(TracingConfig(**values))
    assert says in told.value.message
    assert "s3cret" not in told.value.message and "pw" not in told.value.message


def test_the_path_of_traces_is_added_where_there_is_none() -> None:
    assert http_endpoint("http://c:4318") == "http://c:4318/v1/traces"
    assert http_endpoint("http://c:4318/") == "http://c:4318/v1/traces"
    assert http_endpoint("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"
