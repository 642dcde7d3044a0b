"""The observer's tracer: builds the spans of requests that are kept, and has them sent."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxserve.config import TracingConfig
from jaxserve.http.observer.part import Part
from jaxserve.protocol.records import RequestRecord
from jaxserve.telemetry.tracing.clock import WallClock
from jaxserve.telemetry.tracing.export import Export
from jaxserve.telemetry.tracing.sampling import Sampler
from jaxserve.telemetry.tracing.spans import spans_of


class Tracer:
    """Traces requests as they end.

    Args:
        export: where spans go; it has been started.
        clock: the wall clock.
    """

    def __init__(self, config: TracingConfig, export: Export, clock: WallClock) -> None:
        self._sampler = Sampler(config)
        self._export = export
        self._clock = clock
        self._kept: Counter[str] = Counter(failed=0, slow=0, sampled=0)

    def part(self) -> Part:
        """What it takes part in."""
        return Part(
            name="tracing",
            ended=self.ended,
            tick=self.tick,
            metrics=self.metrics,
            close=self.close,
        )

    def ended(self, record: RequestRecord) -> None:
        """Traces one request, if it is kept."""
        reason = self._sampler.keeps(record)
        if not reason or not record.trace_id:
            return
        self._kept[reason] += 1
        spans = spans_of(record)
        spans[0].attributes = {**spans[0].attributes, "jaxserve.kept": reason}
        self._export.offer(spans, self._clock.offset_ns)

    async def tick(self) -> None:
        """Follows the wall clock."""
        self._clock.refresh()

    async def close(self) -> None:
        """Sends what waits."""
        await asyncio.to_thread(self._export.close)

    def metrics(self) -> Iterator[Metric]:
        """What became of traces and spans."""
        export = self._export
        kept = CounterMetricFamily("jaxserve_traces_kept", "Requests traced", labels=["reason"])
        for reason, count in self._kept.items():
            kept.add_metric([reason], count)
        yield kept
        yield CounterMetricFamily(
            "jaxserve_spans_sent", "Spans that the collector took", export.num_sent
        )
        dropped = CounterMetricFamily(
            "jaxserve_spans_dropped",
            "Spans dropped since the collector took none (refused) or too many waited (full)",
            labels=["reason"],
        )
        for reason, count in export.dropped.items():
            dropped.add_metric([reason], count)
        yield dropped
        yield GaugeMetricFamily(
            "jaxserve_spans_waiting", "Spans that wait for the collector", export.num_waiting
        )


def make_tracing(config: TracingConfig) -> list[Part]:
    """The tracer; none where there is no collector to send to."""
    if not config.endpoint:
        return []
    from jaxserve.telemetry.tracing.otlp import Sender  # OpenTelemetry takes a while to import

    sender = Sender(config, secrets.token_hex(8))
    export = Export(sender.send, sender.close, config.max_spans, config.endpoint)
    export.start()
    return [Tracer(config, export, WallClock()).part()]
