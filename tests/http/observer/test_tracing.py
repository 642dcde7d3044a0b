"""The tracer as a part of the observer: what it keeps, counts, and survives."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from jaxserve.config import Config, TracingConfig
from jaxserve.errors import ConfigError
from jaxserve.http.observer.parts import check_parts, make_parts
from jaxserve.http.observer.tracing import Tracer, make_tracing
from jaxserve.protocol.records import Outcome
from jaxserve.telemetry.tracing.clock import WallClock
from jaxserve.telemetry.tracing.export import Export
from jaxserve.telemetry.tracing.spans import Span
from tests.fakes.otlp import http_receiver
from tests.telemetry.tracing.records import record

S = 1_000_000_000
CONFIG = TracingConfig(endpoint="http://127.0.0.1:1", sample_ratio=0.5)


class Bench:
    """A tracer with clocks of its own, whose spans stay here."""

    def __init__(self, config: TracingConfig = CONFIG, max_spans: int = 1000) -> None:
        self.sent: list[tuple[Span, int]] = []
        self.monotonic_ns, self.wall_ns = 10**6, 1_700_000_000 * S
        self.export = Export(self.send, lambda: None, max_spans, "there")
        clock = WallClock(lambda: self.monotonic_ns, lambda: self.wall_ns)
        self.tracer = Tracer(config, self.export, clock)
        self.part = self.tracer.part()

    def send(self, spans, offset_ns: int) -> bool:
        self.sent += [(span, offset_ns) for span in spans]
        return True

    def tell(self, *records) -> None:
        assert self.part.ended is not None
        for own in records:
            self.part.ended(own)

    def tick(self) -> None:
        assert self.part.tick is not None
        asyncio.run(self.part.tick())

    def close(self) -> None:
        self.export.start()
        assert self.part.close is not None
        asyncio.run(self.part.close())

    def metrics(self) -> dict[str, float]:
        """As they are scraped."""
        metrics = self.part.metrics
        assert metrics is not None

        class Own(Collector):
            def collect(self):
                return metrics()

        registry = CollectorRegistry()
        registry.register(Own())
        lines = generate_latest(registry).decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}


def test_what_is_kept_is_sent_and_counted_by_its_reason() -> None:
    bench = Bench()
    bench.tell(
        record(),
        record(sampled=False),
        record(sampled=False, outcome=Outcome.FAILED),
        record(sampled=False, done_ns=61 * S),
        record(trace_id=""),
    )
    assert bench.metrics()["jaxserve_spans_waiting"] == 27
    bench.close()
    roots = [span for span, _ in bench.sent if span.is_request]
    assert [root.attributes["jaxserve.kept"] for root in roots] == ["sampled", "failed", "slow"]
    assert bench.metrics() == {
        'jaxserve_traces_kept_total{reason="failed"}': 1,
        'jaxserve_traces_kept_total{reason="slow"}': 1,
        'jaxserve_traces_kept_total{reason="sampled"}': 1,
        "jaxserve_spans_sent_total": 27,
        'jaxserve_spans_dropped_total{reason="full"}': 0,
        'jaxserve_spans_dropped_total{reason="refused"}': 0,
        "jaxserve_spans_waiting": 0,
    }


@pytest.mark.parametrize("step_s", [-86_400, 86_400])
def test_a_step_of_the_wall_clock_breaks_no_trace(step_s: int) -> None:
    bench = Bench()
    bench.tell(record())
    bench.wall_ns += step_s * S
    bench.tell(record(span_id="1" * 16))  # before it was noticed
    bench.tick()
    bench.tell(record(span_id="2" * 16))
    bench.close()
    offsets: dict[str, set[int]] = {}
    for number, (_, offset_ns) in enumerate(bench.sent):
        offsets.setdefault(bench.sent[number // 9 * 9][0].span_id, set()).add(offset_ns)
    assert all(len(own) == 1 for own in offsets.values())  # a whole trace has one clock
    first, second, third = (own.pop() for own in offsets.values())
    assert first == second and third - first == step_s * S


def test_without_a_collector_there_is_no_tracer(tmp_path: Path) -> None:
    assert make_tracing(TracingConfig()) == []
    names = [part.name for part in make_parts(Config(), tmp_path, lambda *_: None, lambda *_: None)]
    assert "tracing" not in names


def test_wrong_settings_end_the_start_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"tracing\.endpoint"):
        check_parts(Config(tracing=TracingConfig(endpoint="here")))


def test_looking_at_the_settings_does_not_load_opentelemetry() -> None:
    code = (
        "import sys\n"
        "from jaxserve.config import Config, TracingConfig\n"
        "from jaxserve.http.observer.parts import check_parts\n"
        "check_parts(Config(tracing=TracingConfig(endpoint='http://127.0.0.1:4317')))\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print('grpc' in loaded, 'opentelemetry.sdk' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_tracer_as_it_is_made_sends_to_its_collector() -> None:
    with http_receiver() as receiver:
        (part,) = make_tracing(TracingConfig(endpoint=receiver.endpoint, protocol="http"))
        assert part.ended is not None and part.close is not None
        part.ended(record())
        asyncio.run(part.close())
        assert len(receiver.spans) == 9
