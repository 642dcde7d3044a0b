"""Alerts and baselines as parts of the observer.

The part of alerts comes first: others are given its `on_alert`. It watches the engine's lives and
the observer's own faults itself; the part of baselines says when the server is slower than it was.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxserve.config import Config
from jaxserve.http.observer.messages import Answer, News, Question
from jaxserve.http.observer.part import Part
from jaxserve.protocol.status import EngineStatus
from jaxserve.telemetry.alerts.book import OnAlert
from jaxserve.telemetry.alerts.engine import EngineWatch
from jaxserve.telemetry.alerts.incident import Incident, Severity
from jaxserve.telemetry.alerts.notifier import Notifier
from jaxserve.telemetry.alerts.receivers import make_receivers
from jaxserve.telemetry.alerts.starts import LOOP_S, Starts
from jaxserve.telemetry.baselines.identity import CONFIGURED, DEPLOYED, Deployment
from jaxserve.telemetry.baselines.watch import Baselines, worse_text
from jaxserve.telemetry.document import Document

logger = logging.getLogger(__name__)

BASELINES_FILE = "baselines.json"
BASELINES_VERSION = 1
#: Between two saves of baselines; a crash loses at most the samples of that time.
SAVE_S = 60.0
#: A fault of a part is an incident for so long after it was last seen.
FAULT_S = 300.0
#: News of changes on purpose (`http.observer.deployment`).
CHANGES = frozenset({DEPLOYED, CONFIGURED})
#: From this part on, a degradation is an error, no longer a warning.
GRAVE_SHIFT = 0.25
#: Series that a degradation names.
_NUM_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Alerts:
    """The part, and how others alert."""

    part: Part
    on_alert: OnAlert
    notifier: Notifier


def make_alerts(
    config: Config,
    state: Path,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
) -> Alerts:
    """The part of alerts.

    Args:
        state: directory of what outlives this process.

    Raises:
        ConfigError: a receiver's entry is wrong.
    """
    settings = config.alerts
    notifier = Notifier(
        make_receivers(settings, source_name(config)),
        state,
        hold_s=settings.hold_s,
        resend_s=settings.resend_s,
        monotonic=monotonic,
        wall=wall,
    )
    book = notifier.book
    engine = EngineWatch(book.on_alert)
    faults: dict[str, float] = {}
    starts = Starts(state, wall)

    def on_news(news: News) -> None:
        at_s = news.at_ns / 1e9
        match news.kind:
            case "engine_down":
                engine.down(at_s)
            case "engine_failed":
                engine.failed(news.subject, at_s)
            case "part_failed":
                faults[news.subject] = monotonic()

    def on_status(status: EngineStatus) -> None:
        match status.state:
            case "ready" | "draining":
                engine.ready()
            case "restarting" | "failed":
                engine.away(monotonic())

    async def tick() -> None:
        now_s = monotonic()
        engine.tick(now_s)
        deaths = f"{starts.num_deaths()} within {LOOP_S:.0f} s"
        title = "The observer dies and is started again and again"
        book.on_alert("observer", starts.is_loop(), Severity.ERROR, title, {"deaths": deaths})
        for part, at_s in list(faults.items()):
            firing = now_s - at_s < FAULT_S
            book.on_alert(
                f"observer:{part}",
                firing,
                Severity.WARNING,
                f"The observer's part {part} fails",
                {"part": part, "remedy": "see the server's log"},
            )
            if not firing:
                del faults[part]
        await notifier.tick()

    async def ask(question: Question) -> Answer:
        return Answer(body=msgspec.json.encode(describe(notifier)))

    async def close() -> None:
        await notifier.close()
        starts.ended()

    return Alerts(
        part=Part(
            name="alerts",
            news=on_news,
            status=on_status,
            tick=tick,
            flush=notifier.save,
            asks={"alerts": ask},
            metrics=lambda: _metrics(notifier),
            close=close,
        ),
        on_alert=book.on_alert,
        notifier=notifier,
    )


def make_baselines(
    config: Config,
    deployment: Deployment,
    state: Path,
    on_alert: OnAlert,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
) -> Part:
    """The part of baselines.

    Args:
        deployment: whose baselines they are.
        state: directory of what outlives this process.
        on_alert: of the part of alerts.
    """
    settings = config.alerts
    baselines = Baselines(
        model=config.model.served_name or Path(config.model.path).name,
        version=deployment.version,
        sample_s=settings.sample_s,
        min_shift=settings.min_shift,
        baseline_samples=settings.baseline_samples,
        wall=wall,
    )
    keeper = _Keeper(baselines, Document(state / BASELINES_FILE, BASELINES_VERSION), monotonic)

    def on_news(news: News) -> None:
        if news.kind in CHANGES:
            baselines.changed(news.subject or news.kind)

    def on_status(status: EngineStatus) -> None:
        baselines.status(status, monotonic())

    async def tick() -> None:
        baselines.tick(monotonic())
        alert_degraded(baselines, on_alert)
        await keeper.save_at_times()

    async def ask(question: Question) -> Answer:
        body = {"series": baselines.describe(), "changes": list(baselines.changes)[::-1]}
        return Answer(body=msgspec.json.encode(body))

    return Part(
        name="baselines",
        ended=baselines.ended,
        step=baselines.step,
        status=on_status,
        news=on_news,
        tick=tick,
        asks={"baselines": ask},
        metrics=lambda: _baseline_metrics(baselines),
        close=keeper.save,
    )


def source_name(config: Config) -> str:
    """What the server is called in alerts."""
    return config.alerts.source or f"{socket.gethostname()}:{config.http.port}"


def alert_degraded(baselines: Baselines, on_alert: OnAlert) -> None:
    """Says of each model whether it is slower than its baselines: one incident a model."""
    degraded = baselines.degraded()
    for model in baselines.models():
        worse = [series for series in degraded if series.key.model == model]
        severity, title, details = Severity.WARNING, "", {}
        if worse:
            first = worse[0]
            shift = next(worse_text(first))
            title = f"{model} is worse than its baseline: {first.key.metric} {shift}"
            details = {
                f"{series.key.metric} ({series.key.band})": ", ".join(worse_text(series))
                for series in worse[:_NUM_NAMED]
            }
            details |= {"version": first.key.version, "device": first.key.device}
            if abs(first.detector.shift) >= GRAVE_SHIFT:
                severity = Severity.ERROR
        on_alert(f"degradation:{model}", bool(worse), severity, title, details)


def describe(notifier: Notifier) -> dict[str, Any]:
    """The document of /v1/alerts; without any address or key."""
    return {
        "open": [_shown(incident) for incident in notifier.book.open],
        "recent": [_shown(incident) for incident in notifier.book.recent],
        "receivers": [
            {
                "name": courier.receiver.name,
                "least": courier.receiver.least,
                "queued": len(courier.queue),
                "sent": courier.num_sent,
                "failed": courier.num_failed,
                "dropped": courier.num_dropped,
                "error": courier.last_error,
            }
            for courier in notifier.couriers
        ],
    }


class _Keeper:
    """Saves baselines now and then; a disk that takes nothing costs what came since."""

    def __init__(
        self, baselines: Baselines, document: Document, monotonic: Callable[[], float]
    ) -> None:
        self._baselines = baselines
        self._document = document
        self._monotonic = monotonic
        self._saved_s = monotonic()
        self._failing = False
        state = document.load()
        if state is not None:
            try:
                baselines.restore(state, monotonic())
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                document.set_aside(f"{type(error).__name__}: {error}")

    async def save_at_times(self) -> None:
        if self._monotonic() - self._saved_s >= SAVE_S:
            await self.save()

    async def save(self) -> None:
        self._saved_s = self._monotonic()
        try:
            await asyncio.to_thread(self._document.save, self._baselines.state())
        except OSError as error:
            if not self._failing:
                logger.error("baselines cannot be kept on the disk: %s", error.strerror or error)
            self._failing = True
        else:
            self._failing = False


def _shown(incident: Incident) -> dict[str, Any]:
    return {
        "key": incident.key,
        "severity": incident.severity,
        "title": incident.title,
        "details": incident.details,
        "started_at": incident.started_s,
        "ended_at": incident.ended_s or None,
    }


def _metrics(notifier: Notifier) -> Iterable[Metric]:
    severities = [incident.severity for incident in notifier.book.open]
    opened = GaugeMetricFamily("jaxserve_alerts_open", "Open incidents", labels=["severity"])
    for severity in Severity:
        opened.add_metric([severity], severities.count(severity))
    yield opened
    notices = CounterMetricFamily(
        "jaxserve_alert_notices",
        "Attempts to tell a receiver, by their end",
        labels=["receiver", "result"],
    )
    queued = GaugeMetricFamily(
        "jaxserve_alert_queue", "Notices that wait for a receiver", labels=["receiver"]
    )
    for courier in notifier.couriers:
        name = courier.receiver.name
        notices.add_metric([name, "sent"], courier.num_sent)
        notices.add_metric([name, "failed"], courier.num_failed)
        notices.add_metric([name, "dropped"], courier.num_dropped)
        queued.add_metric([name], len(courier.queue))
    yield notices
    yield queued
    yield CounterMetricFamily(
        "jaxserve_alerts_unsaved",
        "Times that the disk did not take the incidents",
        notifier.num_unsaved,
    )


def _baseline_metrics(baselines: Baselines) -> Iterable[Metric]:
    worse = GaugeMetricFamily(
        "jaxserve_degraded_series", "Series worse than their baseline", labels=["metric"]
    )
    counts: dict[str, int] = {}
    for series in baselines.degraded():
        counts[series.key.metric] = counts.get(series.key.metric, 0) + 1
    for metric, count in counts.items():
        worse.add_metric([metric], count)
    yield worse
