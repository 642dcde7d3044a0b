"""All baselines of a server: which measurements make which series, and what is said of them.

| metric | of | band |
|---|---|---|
| ttft | requests that were answered | prompt tokens to compute, rows |
| tpot | the same, with two tokens or more | rows |
| step_time, mbu | device calls that only decode | the step program, so the batch's bucket |
| throughput | all device calls, with the pauses between them while work was there | kind, rows |
| accept_rate | drafts of a call | rows |

mbu is in bytes per second: of one device that is MBU up to a constant, which shifts do not depend
on. All series of a model that are worse than their baselines are one incident: one cause shows in
many of them.

A baseline belongs to a model, a version (`identity.Deployment`) and a device, so that another
deployment has its own, and the old one is found again after a roll-back. What comes before the
engine has said what it computes on belongs to none, and is not counted. Times are monotonic
seconds.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.telemetry.baselines.detector import Detector, Finding
from jaxserve.telemetry.baselines.identity import device_name
from jaxserve.telemetry.baselines.series import METRICS, Series, SeriesKey

logger = logging.getLogger(__name__)

#: Series that are followed at once; of other versions, those that are kept.
MAX_SERIES = 400
MAX_SHELVED = 1200
#: An alarm without samples for so long is over: nobody can say whether it still is so.
STALE_S = 3600.0
#: Changes that are shown.
NUM_CHANGES = 100


class Baselines:
    """Follows one server.

    Args:
        model: name, until the engine says another.
        version, device: see `identity`; no device until the engine has said which.
        sample_s, min_shift, baseline_samples: as in `AlertsConfig`.
        wall: clock, in seconds, of what is shown.

    Attributes:
        changes: what was found, the newest last.
    """

    def __init__(
        self,
        *,
        model: str,
        version: str,
        device: str = "",
        sample_s: float = 10.0,
        min_shift: float = 0.03,
        baseline_samples: int = 500,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.changes: deque[dict[str, Any]] = deque(maxlen=NUM_CHANGES)
        self._model = model
        self._version = version
        self._device = device
        self._sample_s = sample_s
        self._min_shift = min_shift
        self._baseline_samples = baseline_samples
        self._wall = wall
        self._series: dict[SeriesKey, Series] = {}
        self._shelved: dict[SeriesKey, dict[str, Any]] = {}
        self._chance = random.Random(0)
        self._rows = 0
        self._busy = False  # rows were left over by the device call before

    # ------------------------------------------------------------------ what comes

    def ended(self, record: RequestRecord) -> None:
        """A request has ended."""
        if record.outcome is not Outcome.DONE or not record.done_ns:
            return
        at_s, rows = record.done_ns / 1e9, _band(self._rows)
        if record.ttft_ns is not None and record.ttft_ns > 0:
            computed = max(1, record.prompt_tokens - record.cached_tokens)
            band = f"prompt {_band(computed, 4)}, rows {rows}"
            self._add("ttft", band, at_s, record.ttft_ns / 1e9)
        if record.tpot_ns is not None and record.tpot_ns > 0:
            self._add("tpot", f"rows {rows}", at_s, record.tpot_ns / 1e9)

    def step(self, stats: StepStats) -> None:
        """A device call was made."""
        device_s, at_s = stats.device_ns / 1e9, stats.at_ns / 1e9
        busy, self._busy = self._busy, stats.running > 0
        if stats.rows <= 0 or device_s <= 0 or not at_s:
            return
        self._rows = stats.rows
        rows = f"rows {_band(stats.rows)}"
        if not stats.prefill_tokens:
            self._add("step_time", stats.program, at_s, device_s)
            self._add("mbu", stats.program, at_s, stats.bytes, device_s)
        passed_s = device_s + (stats.idle_ns / 1e9 if busy else 0.0)
        kind = "prefill" if stats.prefill_tokens else "decode"
        self._add("throughput", f"{kind}, {rows}", at_s, stats.tokens, passed_s)
        if stats.draft_tokens > 0:
            accepted = stats.draft_accepted_tokens
            self._add("accept_rate", rows, at_s, accepted, stats.draft_tokens)

    def status(self, status: EngineStatus, now_s: float) -> None:
        """The engine says which model it serves, and on what."""
        if status.model is None:
            return
        model, device = status.model.name, device_name(status.device)
        if (model, device) != (self._model, self._device):
            self._model, self._device = model, device
            self._begin(now_s)

    def changed(self, reason: str) -> None:
        """Something was changed on purpose, and is in the version or the device."""
        self._note("marked", None, 0.0, reason)

    def tick(self, now_s: float) -> None:
        """Closes samples whose time is over, and alarms that nothing is known of any more."""
        for series in list(self._series.values()):
            self._found(series, series.tick(now_s))
            if series.detector.alarmed and now_s - series.last_s > STALE_S:
                series.detector.dismiss()
                self._note("stale", series.key, 0.0)

    # ------------------------------------------------------------------ what is said

    def degraded(self) -> list[Series]:
        """Series that are worse than their baselines, the worst first."""
        worse = [s for s in self._series.values() if s.detector.alarmed]
        return sorted(worse, key=lambda s: -abs(s.detector.shift))

    def models(self) -> set[str]:
        """That have been followed, also by servers before this one."""
        return {key.model for key in (*self._series, *self._shelved)} | {self._model}

    def describe(self) -> list[dict[str, Any]]:
        """All series that are followed."""
        return [series.describe() for series in self._series.values()]

    # ------------------------------------------------------------------ what is kept

    def state(self) -> dict[str, Any]:
        """What outlives the process."""
        live = {key: s.detector.state() for key, s in self._series.items()}
        kept = self._shelved | live
        return {
            "series": [
                {"key": asdict(key), "state": state}
                for key, state in list(kept.items())[-MAX_SHELVED:]
            ],
            "changes": list(self.changes),
        }

    def restore(self, state: dict[str, Any], now_s: float) -> None:
        """Goes on from a `state`; raises ValueError, TypeError or KeyError where it is none."""
        loaded = {SeriesKey(**entry["key"]): entry["state"] for entry in state["series"]}
        for key in loaded:
            self._detector(key).restore(loaded[key])  # all of them, before any is believed
        self._shelved = loaded
        self.changes.extend(dict(change) for change in state["changes"])
        self._begin(now_s)

    # ------------------------------------------------------------------ series

    def _begin(self, now_s: float) -> None:
        """Takes up the series of what serves now; those of anything else are put away."""
        identity = self._model, self._version, self._device
        for key in [k for k in self._series if (k.model, k.version, k.device) != identity]:
            self._shelved[key] = self._series.pop(key).detector.state()
        for key in [k for k in self._shelved if (k.model, k.version, k.device) == identity]:
            self._of(key, now_s)

    def _add(self, metric: str, band: str, at_s: float, value: float, weight: float = 1.0) -> None:
        if not self._device:
            return
        key = SeriesKey(
            metric=metric,
            model=self._model,
            version=self._version,
            device=self._device,
            band=band,
        )
        series = self._of(key, at_s)
        self._found(series, series.add(at_s, value, weight))

    def _of(self, key: SeriesKey, now_s: float) -> Series:
        series = self._series.get(key)
        if series is None:
            detector = self._detector(key)
            if (state := self._shelved.pop(key, None)) is not None:
                detector.restore(state)
            series = Series(key, detector, self._sample_s, self._chance)
            series.last_s = now_s
            self._series[key] = series
            while len(self._series) > MAX_SERIES:
                oldest = min(self._series.values(), key=lambda s: s.last_s)
                del self._series[oldest.key]
                self._shelved[oldest.key] = oldest.detector.state()
            while len(self._shelved) > MAX_SHELVED:
                del self._shelved[next(iter(self._shelved))]
        return series

    def _detector(self, key: SeriesKey) -> Detector:
        return Detector(
            higher_is_worse=METRICS[key.metric].higher_is_worse,
            min_shift=self._min_shift,
            baseline_samples=self._baseline_samples,
        )

    def _found(self, series: Series, finding: Finding) -> None:
        if finding is Finding.NOTHING:
            return
        shift = series.detector.shift
        self._note(finding, series.key, shift)
        logger.info("baseline: %s is %s by %+.1f%%", series.key, finding, 100 * shift)

    def _note(self, what: str, key: SeriesKey | None, shift: float, reason: str = "") -> None:
        change = {"at": self._wall(), "what": str(what), "version": self._version}
        if key is not None:
            change |= {"metric": key.metric, "model": key.model, "band": key.band}
            change["shift"] = shift
        self.changes.append(change | ({"reason": reason} if reason else {}))


def worse_text(series: Series) -> Iterator[str]:
    """By how much a series is worse than its baseline, for people: the part, and the values."""
    detector = series.detector
    yield f"{100 * detector.shift:+.1f}%"
    yield f"{detector.center:.4g} {series.metric.unit} was normal".replace("  ", " ")


def _band(value: int, base: int = 2) -> str:
    """Between powers of the base: "1", "2-3", "4-7"…"""
    low = 1
    while low * base <= value:
        low *= base
    high = low * base - 1
    return f"{low}-{high}" if high > low else str(low)
