"""Shows what was counted: the sums over all workers, and what the engine said last."""

from __future__ import annotations

import time
from collections.abc import Iterator

from jaxserve.config import TelemetryConfig
from jaxserve.http.metrics import families as f
from jaxserve.http.metrics.aliases import VllmNames
from jaxserve.http.metrics.cells import Cells
from jaxserve.http.metrics.exemplars import Exemplars
from jaxserve.http.metrics.exposition import OpenText, Text, label_text
from jaxserve.http.metrics.window import Window
from jaxserve.protocol.status import EngineStatus
from jaxserve.types import DeviceInfo

#: Gauges of the status: name, meaning, attribute.
_GAUGES = (
    ("running", "Sequences that run", "running"),
    ("waiting", "Sequences that wait", "waiting"),
    ("rows_capacity", "Sequences that can run at once", "max_rows"),
    ("texts_waiting", "Texts that wait to be embedded", "texts_waiting"),
    ("pages_used", "KV pages in use", "pages_used"),
    ("pages_capacity", "KV pages of the pool", "pages_total"),
    ("pages_cached", "KV pages not in use that can still be found", "pages_cached"),
    ("swapped", "Waiting sequences whose KV pages are on the host", "swapped"),
    ("host_pages_used", "KV pages in use on the host", "host_pages_used"),
    ("host_pages_capacity", "KV pages that the host has room for", "host_pages_total"),
    ("adapter_slots", "Slots for LoRA adapters", "adapter_slots"),
    ("adapters_held", "LoRA adapters in slots", "adapters_held"),
    ("adapter_host_bytes", "Of adapters in the host's memory", "adapter_host_bytes"),
    ("compiles_after_warmup", "Compilations since ready", "compiles_after_warmup"),
    ("step_age_seconds", "Since the step loop last turned", "step_age_s"),
)


class Collecting:
    """Renders /metrics.

    Args:
        page_size: tokens a KV page.
        exemplars: of this process's histograms.
    """

    def __init__(
        self,
        cells: Cells,
        window: Window,
        config: TelemetryConfig,
        page_size: int,
        exemplars: Exemplars,
    ) -> None:
        self._exemplars = exemplars
        self._cells = cells
        self._window = window
        self._config = config
        self._vllm = VllmNames(cells, page_size) if config.vllm_metrics else None

    def render(self, status: EngineStatus | None, *, is_open: bool = False) -> bytes:
        """The text format.

        Args:
            status: the engine's last; None before it has said anything.
            is_open: whether as OpenMetrics, without its last line.
        """
        self._cells.refresh()
        text = OpenText() if is_open else Text()
        for family in f.FAMILIES.values():
            if not family.hidden:
                self._family(text, family)
        for family, name, documentation in (
            (f.LEVEL, "overload_level", "What is given up because of load, 0 to 3"),
            (f.WAIT, "estimated_wait_seconds", "Of a request of normal priority, if looked at"),
        ):
            (series,) = self._cells.series(family.name)
            _gauge(text, name, documentation, self._cells.largest(series))
        _gauge(
            *(text, "metric_series_refused"),
            *("Series that found no room and are not shown", self._cells.num_refused),
        )
        ready = status is not None and status.state == "ready"
        _gauge(text, "engine_ready", "1 if it serves", float(ready))
        if status is not None:
            self._engine(text, status)
            if self._vllm is not None and status.model is not None:
                self._vllm.write(text, status, status.model)
        return text.encoded()

    def _family(self, text: Text, family: f.Family) -> None:
        if not family.labels:
            text.head(family.name, family.kind, family.documentation)
            self._one(text, family, "", f.totals_of(self._cells, family))
            return
        series = self._cells.series(family.name)
        if series:
            text.head(family.name, family.kind, family.documentation)
        for one in series:
            labels = label_text(family.labels, one.labels)
            self._one(text, family, labels, self._cells.totals(one), one.first)

    def _one(
        self, text: Text, family: f.Family, labels: str, totals: list[float], first: int = -1
    ) -> None:
        if family.kind == "histogram":
            counts, total = f.cumulative(family, totals, family.shown)
            exemplars = self._exemplars.shown(first, f.selection(family.bounds, family.shown))
            text.histogram(family.name, labels, family.shown, counts, total, exemplars)
        else:
            text.sample(family.name, labels, totals[0])

    def _engine(self, text: Text, status: EngineStatus) -> None:
        for name, documentation, attribute in _GAUGES:
            _gauge(text, name, documentation, getattr(status, attribute))
        if status.model is not None:
            device = status.device.kind if status.device is not None else ""
            labels = label_text(("device", "model"), (device, status.model.name))
            _gauge(text, "model_info", "Which model is served, on what", 1, labels)
        for name, documentation, value in self._use(status.device):
            _gauge(text, name, documentation, value)

    def _use(self, device: DeviceInfo | None) -> Iterator[tuple[str, str, float]]:
        """How much of what the devices could do is done; nothing of what is not known."""
        count = device.count if device is not None else 1
        flops = self._config.device_flops_per_s or (device.flops_per_s if device else 0)
        num_bytes = self._config.device_bytes_per_s or (device.bytes_per_s if device else 0)
        if device is not None:
            yield "devices", "Devices of the engine", count
        flops_rate, bytes_rate = self._window.rates(time.monotonic_ns())
        if flops > 0:
            peak = flops * count
            yield "peak_flops_per_second", "What all devices could compute", peak
            yield "mfu_ratio", "FLOPs of the last 10 s beside what could be", flops_rate / peak
        if num_bytes > 0:
            peak = num_bytes * count
            yield "peak_bytes_per_second", "What all devices' memories could move", peak
            yield "mbu_ratio", "Bytes of the last 10 s beside what could be", bytes_rate / peak


def _gauge(text: Text, name: str, documentation: str, value: float, labels: str = "") -> None:
    text.head(f"jaxserve_{name}", "gauge", documentation)
    text.sample(f"jaxserve_{name}", labels, value)
