"""One measured quantity over time: its events, made into samples, and their detector.

Events (a request's TTFT, a step's time) come by the thousand and are skewed; a sample is the median
of those of some seconds, or the ratio of their sums, so that its noise is small and nearly normal.
Where little comes, a sample waits for enough; where nothing comes there is none.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import median
from typing import Any

from jaxserve.telemetry.baselines.detector import Detector, Finding

#: Events of a sample, at least; kept of them, at most.
MIN_EVENTS = 8
MAX_EVENTS = 256


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is measured.

    Attributes:
        higher_is_worse: direction.
        ratio: samples are sums of the first over sums of the second of each event; else medians.
    """

    name: str
    unit: str
    higher_is_worse: bool
    ratio: bool = False


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="ttft", unit="s", higher_is_worse=True),
        Metric(name="tpot", unit="s", higher_is_worse=True),
        Metric(name="step_time", unit="s", higher_is_worse=True),
        Metric(name="throughput", unit="tokens/s", higher_is_worse=False, ratio=True),
        Metric(name="mbu", unit="bytes/s", higher_is_worse=False, ratio=True),
        Metric(name="accept_rate", unit="", higher_is_worse=False, ratio=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class SeriesKey:
    """Whose baseline it is.

    Attributes:
        metric: one of METRICS.
        model: name; version: what else decides how fast it is: the deployment's fingerprint.
        device: that it runs on.
        band: of load: rows of a batch, tokens of a prompt; in powers, as text.
    """

    metric: str
    model: str
    version: str
    device: str
    band: str

    def __str__(self) -> str:
        return f"{self.metric} of {self.model} ({self.band})"


class Series:
    """Samples of one key.

    Args:
        sample_s: for how long events are collected.
        chance: of the events that are kept where there are too many.
    """

    def __init__(
        self, key: SeriesKey, detector: Detector, sample_s: float, chance: random.Random
    ) -> None:
        self.key = key
        self.metric = METRICS[key.metric]
        self.detector = detector
        self.last_s = 0.0  # of the last event
        self.last = math.nan
        self._sample_s = sample_s
        self._chance = chance
        self._since_s: float | None = None
        self._num_events = 0
        self._events: list[float] = []
        self._top = self._bottom = 0.0

    def add(self, now_s: float, value: float, weight: float = 1.0) -> Finding:
        """Takes an event; what it has brought to light, if it completes a sample.

        Args:
            value: a median's event, or the upper part of a ratio's.
            weight: the lower part.
        """
        if not (math.isfinite(value) and math.isfinite(weight)):
            return Finding.NOTHING
        # The event that finds the time over closes the sample of those before it.
        found = self.tick(now_s)
        if self._since_s is None:
            self._since_s = now_s
        self._num_events += 1
        self.last_s = now_s
        if self.metric.ratio:
            self._top += value
            self._bottom += weight
        elif len(self._events) < MAX_EVENTS:
            self._events.append(value)
        elif (place := self._chance.randrange(self._num_events)) < MAX_EVENTS:
            self._events[place] = value
        return found

    def tick(self, now_s: float) -> Finding:
        """Closes the sample if its time is over and it has enough events."""
        if (
            self._since_s is None
            or now_s - self._since_s < self._sample_s
            or self._num_events < MIN_EVENTS
        ):
            return Finding.NOTHING
        if self.metric.ratio:
            value = self._top / self._bottom if self._bottom > 0 else math.nan
        else:
            value = median(self._events)
        self._since_s, self._num_events = None, 0
        self._events.clear()
        self._top = self._bottom = 0.0
        self.last = value
        return self.detector.push(value)

    def describe(self) -> dict[str, Any]:
        """For the console and `/v1/alerts`."""
        detector = self.detector
        return {
            "metric": self.key.metric,
            "unit": self.metric.unit,
            "model": self.key.model,
            "version": self.key.version,
            "device": self.key.device,
            "band": self.key.band,
            "samples": len(detector.baseline),
            "ready": detector.is_ready,
            "baseline": _finite(detector.center),
            "last": _finite(self.last),
            "degraded": detector.alarmed,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
