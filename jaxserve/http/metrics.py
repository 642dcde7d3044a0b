"""Prometheus metrics of the HTTP processes, and of the engine as they see it.

Each process counts what it serves. With a shared directory (prometheus_client's multiprocess mode,
which `serve` sets up for its workers) any of them answers /metrics for all. What only the engine
knows (queues, pages) is read from its last status at the scrape; its steps are counted by the one
worker that subscribes to `StepStats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from jaxserve.protocol.messages import EngineStatus, StepStats

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300),
)


class Metrics:
    """The metrics of one HTTP process.

    Args:
        status: gives the engine's last status.
        directory: shared by all workers of a server; "" where this process is alone.
    """

    def __init__(self, status: Callable[[], EngineStatus | None], directory: str = "") -> None:
        self._own = CollectorRegistry()
        self._shared = self._own
        if directory:
            self._shared = CollectorRegistry()
            MultiProcessCollector(self._shared, path=directory)
        self._engine = CollectorRegistry()
        self._engine.register(_EngineCollector(status))
        self._requests = self._counter("requests", "Requests answered", "route", "status")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens submitted")
        self._output_tokens = self._counter("output_tokens", "Tokens generated")
        self._ttft = self._histogram("time_to_first_token", "From arrival to the first token")
        self._itl = self._histogram("inter_token", "Between tokens of a choice, as delivered")
        self._e2e = self._histogram("request_duration", "From arrival to the last token")
        self._in_flight = Gauge(
            "jaxserve_http_requests_in_flight",
            "Requests being answered",
            registry=self._own,
            multiprocess_mode="livesum",
        )
        self._steps = self._counter("steps", "Device calls", "program")
        self._step_seconds = self._counter("step_device_seconds", "Device time", "program")
        self._step_tokens = self._counter("step_tokens", "Tokens run on the device", "kind")
        self._preemptions = self._counter("preemptions", "Sequences set back to make room")

    def render(self) -> bytes:
        """The text format, for all workers."""
        return generate_latest(self._shared) + generate_latest(self._engine)

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def in_flight(self, change: int) -> None:
        """A request has come (1) or gone (-1)."""
        self._in_flight.inc(change)

    def prompt_tokens(self, num_tokens: int) -> None:
        """A request was submitted."""
        self._prompt_tokens.inc(num_tokens)

    def output_tokens(self, num_tokens: int) -> None:
        """Tokens came from the engine."""
        self._output_tokens.inc(num_tokens)

    def first_token(self, seconds: float) -> None:
        """A request's first token is about to be sent."""
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        """Tokens came `seconds` after the choice's tokens before them."""
        self._itl.observe(seconds / num_tokens)

    def request_done(self, seconds: float) -> None:
        """All choices of a request have ended."""
        self._e2e.observe(seconds)

    def step(self, stats: StepStats) -> None:
        """A device call was made."""
        self._steps.labels(stats.program).inc()
        self._step_seconds.labels(stats.program).inc(stats.device_ns / 1e9)
        self._step_tokens.labels("prefill").inc(stats.prefill_tokens)
        self._step_tokens.labels("decode").inc(stats.decode_tokens)
        self._step_tokens.labels("padding").inc(stats.padded_tokens - stats.tokens)
        self._preemptions.inc(stats.preemptions)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"jaxserve_{name}", documentation, labels, registry=self._own)

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(
            f"jaxserve_{name}_seconds", documentation, registry=self._own, buckets=_SECONDS
        )


class _EngineCollector(Collector):
    """What the engine said last, as gauges."""

    def __init__(self, status: Callable[[], EngineStatus | None]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        ready = status is not None and status.state == "ready"
        yield GaugeMetricFamily("jaxserve_engine_ready", "1 if it serves", float(ready))
        if status is None:
            return
        for name, documentation, value in (
            ("running", "Sequences that run", status.running),
            ("waiting", "Sequences that wait", status.waiting),
            ("pages_used", "KV pages in use", status.pages_used),
            ("pages_total", "KV pages of the pool", status.pages_total),
            ("compiles_after_warmup", "Compilations since ready", status.compiles_after_warmup),
            ("step_age_seconds", "Since the step loop last turned", status.step_age_s),
        ):
            yield GaugeMetricFamily(f"jaxserve_{name}", documentation, value)
