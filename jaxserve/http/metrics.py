"""Prometheus metrics of the HTTP processes, and of the engine as they see it.

Each process counts in a row of cells of its own; the rows of all workers lie in one shared file, so
that any worker answers /metrics for all by adding them up. A cell is a float64 that one thread of
one process writes: counting takes no lock, and costs a stream's event next to nothing. What only
the engine knows (queues, pages) is read from its last status at the scrape; its steps are counted
by the one worker that subscribes to `StepStats`.

Invariant: all processes that share a file run the same code, so they agree on the layout.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxserve.limits.admission import REASONS
from jaxserve.protocol.messages import EngineStatus, StepStats

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

ROUTES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}"),
    *("/v1/embeddings", "/v1/score", "/v1/rerank"),
    *("/tokenize", "/detokenize", "/health", "/ready", "/metrics", "other"),
)
#: Statuses counted by themselves; 499 stands for a client that left before its answer began.
STATUSES = (200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 499, 500, 503, 504)

_COUNTERS = {
    "prompt_tokens": "Prompt tokens submitted",
    "embedded_texts": "Texts embedded, or pairs scored",
    "embedded_tokens": "Their tokens",
    "output_tokens": "Tokens generated",
    "steps": "Device calls",
    "step_device_seconds": "Device time of steps",
    "step_idle_seconds": "Time that the device waited between steps",
    "step_flops": "Floating-point operations of steps, counted from shapes",
    "step_bytes": "Bytes that steps move, counted from shapes",
    "step_prefill_tokens": "Prompt tokens run on the device",
    "step_decode_tokens": "Decoded tokens run on the device",
    "step_padding_tokens": "Padding run on the device",
    "draft_tokens": "Next tokens guessed and verified",
    "draft_accepted_tokens": "Guessed tokens that were right",
    "preemptions": "Sequences set back to make room",
    "engine_restarts": "Starts of the engine after its death",
    "requests_replayed": "Requests that went on in another engine",
    "requests_quarantined": "Requests not run any more since they ended the engine alone",
    "prefix_lookup_tokens": "Known tokens of sequences when they took a row",
    "prefix_hit_tokens": "Of these, tokens whose KV was found in the cache",
    "pages_saved": "KV pages copied to the host",
    "pages_loaded": "KV pages copied back from the host",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From arrival to the first token",
    "inter_token_seconds": "Between tokens of a choice",
    "request_duration_seconds": "From arrival to the last token",
}
#: Scope and kind of rate limits.
_LIMITED = tuple(
    (scope, kind) for scope in ("key", "user", "tenant") for kind in ("requests", "tokens")
)
_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)

_SPAN = len(_BOUNDS) + 2  # of a histogram: its buckets, the last open, and its sum
_IN_FLIGHT = 0
_COUNTER = {name: 1 + index for index, name in enumerate(_COUNTERS)}
_HISTOGRAM = {name: 1 + len(_COUNTERS) + _SPAN * i for i, name in enumerate(_HISTOGRAMS)}
_REQUESTS = 1 + len(_COUNTERS) + _SPAN * len(_HISTOGRAMS)
_LIMITS = _REQUESTS + len(ROUTES) * (len(STATUSES) + 1)
_SHED = _LIMITS + len(_LIMITED)
_LEVEL, _WAIT, _STORE_DOWN = range(_SHED + len(REASONS), _SHED + len(REASONS) + 3)
_NUM_CELLS = _STORE_DOWN + 1

_PROMPT_TOKENS = _COUNTER["prompt_tokens"]
_OUTPUT_TOKENS = _COUNTER["output_tokens"]
_TTFT = _HISTOGRAM["time_to_first_token_seconds"]
_ITL = _HISTOGRAM["inter_token_seconds"]
_E2E = _HISTOGRAM["request_duration_seconds"]


def create_shared(path: Path, num_workers: int) -> None:
    """Makes the file that workers count in."""
    path.write_bytes(bytes(8 * _NUM_CELLS * num_workers))


class Metrics:
    """The metrics of one HTTP process.

    Args:
        status: gives the engine's last status.
        shared: the file of all workers; None where this process is alone.
        index: of this process among them.
    """

    def __init__(
        self, status: Callable[[], EngineStatus | None], shared: Path | None = None, index: int = 0
    ) -> None:
        if shared is None:
            self._all = memoryview(bytearray(8 * _NUM_CELLS)).cast("d")
        else:
            with shared.open("r+b") as file:
                self._all = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
        self._own = self._all[index * _NUM_CELLS : (index + 1) * _NUM_CELLS]
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(self._all, status))

    def render(self) -> bytes:
        """The text format, for all workers."""
        return generate_latest(self._registry)

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        column = STATUSES.index(status) if status in STATUSES else len(STATUSES)
        row = ROUTES.index(route if route in ROUTES else "other")
        self._own[_REQUESTS + row * (len(STATUSES) + 1) + column] += 1

    def in_flight(self, change: int) -> None:
        """A request has come (1) or gone (-1)."""
        self._own[_IN_FLIGHT] += change

    def prompt_tokens(self, num_tokens: int) -> None:
        """A request was submitted."""
        self._own[_PROMPT_TOKENS] += num_tokens

    def texts(self, num_texts: int, num_tokens: int) -> None:
        """Texts were embedded."""
        self._own[_COUNTER["embedded_texts"]] += num_texts
        self._own[_COUNTER["embedded_tokens"]] += num_tokens

    def tokens(self, num_tokens: int, since_s: float | None = None) -> None:
        """Tokens came together, `since_s` after the choice's tokens before them, if any."""
        own = self._own
        own[_OUTPUT_TOKENS] += num_tokens
        if since_s is not None:
            own[_ITL + bisect_left(_BOUNDS, since_s / num_tokens)] += num_tokens
            own[_ITL + _SPAN - 1] += since_s

    def first_token(self, seconds: float) -> None:
        """A request's first token is about to be sent."""
        self._observe(_TTFT, seconds)

    def request_done(self, seconds: float) -> None:
        """All choices of a request have ended."""
        self._observe(_E2E, seconds)

    def step(self, stats: StepStats) -> None:
        """A device call was made."""
        own = self._own
        own[_COUNTER["steps"]] += 1
        own[_COUNTER["step_device_seconds"]] += stats.device_ns / 1e9
        own[_COUNTER["step_idle_seconds"]] += stats.idle_ns / 1e9
        own[_COUNTER["step_flops"]] += stats.flops
        own[_COUNTER["step_bytes"]] += stats.bytes
        own[_COUNTER["step_prefill_tokens"]] += stats.prefill_tokens
        own[_COUNTER["step_decode_tokens"]] += stats.decode_tokens
        own[_COUNTER["step_padding_tokens"]] += stats.padded_tokens - stats.tokens
        own[_COUNTER["draft_tokens"]] += stats.draft_tokens
        own[_COUNTER["draft_accepted_tokens"]] += stats.draft_accepted_tokens
        own[_COUNTER["preemptions"]] += stats.preemptions
        own[_COUNTER["prefix_lookup_tokens"]] += stats.prefix_lookup_tokens
        own[_COUNTER["prefix_hit_tokens"]] += stats.prefix_hit_tokens
        own[_COUNTER["pages_saved"]] += stats.pages_saved
        own[_COUNTER["pages_loaded"]] += stats.pages_loaded

    def restarted(self) -> None:
        """The engine has been started again; of all workers one says so."""
        self._own[_COUNTER["engine_restarts"]] += 1

    def replays(self, num_replayed: int, num_quarantined: int) -> None:
        """How many requests of this worker have gone on in another engine, or not, so far."""
        self._own[_COUNTER["requests_replayed"]] = num_replayed
        self._own[_COUNTER["requests_quarantined"]] = num_quarantined

    def limited(self, scope: str, kind: str) -> None:
        """A rate limit refused a request."""
        self._own[_LIMITS + _LIMITED.index((scope, kind))] += 1

    def shed(self, reason: str) -> None:
        """A request was refused or cut short because of load."""
        self._own[_SHED + REASONS.index(reason)] += 1

    def overload(self, level: int, wait_s: float) -> None:
        """What this process takes the load for."""
        self._own[_LEVEL] = level
        self._own[_WAIT] = wait_s

    def store_state(self, is_up: bool) -> None:
        """Whether this process uses the shared store of rate limits."""
        self._own[_STORE_DOWN] = float(not is_up)

    def _observe(self, base: int, seconds: float) -> None:
        self._own[base + bisect_left(_BOUNDS, seconds)] += 1
        self._own[base + _SPAN - 1] += seconds


class _Collector(Collector):
    """The rows of all workers, added up; and what the engine said last."""

    def __init__(self, cells: memoryview[float], status: Callable[[], EngineStatus | None]) -> None:
        self._cells = cells
        self._status = status

    def collect(self) -> Iterator[Metric]:
        sums = [sum(self._cells[cell::_NUM_CELLS]) for cell in range(_NUM_CELLS)]
        yield GaugeMetricFamily(
            "jaxserve_requests_in_flight", "Requests being answered", sums[_IN_FLIGHT]
        )
        for name, documentation in _COUNTERS.items():
            yield CounterMetricFamily(f"jaxserve_{name}", documentation, sums[_COUNTER[name]])
        for name, documentation in _HISTOGRAMS.items():
            yield _histogram(name, documentation, sums[_HISTOGRAM[name] :][:_SPAN])
        yield _requests(sums)
        status = self._status()
        yield from _limits(sums)
        yield _shed(sums, status)
        for cell, name, documentation in (
            (_LEVEL, "overload_level", "What is given up because of load, 0 to 3"),
            (_WAIT, "estimated_wait_seconds", "Of a request of normal priority, if looked at"),
        ):
            value = max(self._cells[cell::_NUM_CELLS])
            yield GaugeMetricFamily(f"jaxserve_{name}", documentation, value)
        yield from _engine(status)


def _histogram(name: str, documentation: str, cells: Sequence[float]) -> Metric:
    total = 0.0
    buckets = []
    for bound, count in zip((*_BOUNDS, "+Inf"), cells[:-1], strict=True):
        total += count
        buckets.append((str(bound), total))
    return HistogramMetricFamily(
        f"jaxserve_{name}", documentation, buckets=buckets, sum_value=cells[-1]
    )


def _requests(sums: Sequence[float]) -> Metric:
    family = CounterMetricFamily(
        "jaxserve_requests", "Requests answered", labels=["route", "status"]
    )
    cell = _REQUESTS
    for route in ROUTES:
        for status in (*STATUSES, "other"):
            if sums[cell]:
                family.add_metric([route, str(status)], sums[cell])
            cell += 1
    return family


def _limits(sums: Sequence[float]) -> Iterator[Metric]:
    limited = CounterMetricFamily(
        "jaxserve_rate_limited", "Requests refused by a rate limit", labels=["scope", "kind"]
    )
    for index, labels in enumerate(_LIMITED):
        limited.add_metric(labels, sums[_LIMITS + index])
    yield limited
    yield GaugeMetricFamily(
        "jaxserve_limit_store_down",
        "HTTP processes that cannot reach the shared store of rate limits",
        sums[_STORE_DOWN],
    )


def _shed(sums: Sequence[float], status: EngineStatus | None) -> Metric:
    """What the front end refused or cut short, and what the engine's queue did."""
    family = CounterMetricFamily(
        "jaxserve_shed",
        "Requests refused, pushed out or cut short because of load",
        labels=["reason"],
    )
    counts = {reason: sums[_SHED + index] for index, reason in enumerate(REASONS)}
    for reason, count in (counts | (status.shed if status is not None else {})).items():
        family.add_metric([reason], count)
    return family


def _engine(status: EngineStatus | None) -> Iterator[Metric]:
    ready = status is not None and status.state == "ready"
    yield GaugeMetricFamily("jaxserve_engine_ready", "1 if it serves", float(ready))
    if status is None:
        return
    for name, documentation, value in (
        ("running", "Sequences that run", status.running),
        ("waiting", "Sequences that wait", status.waiting),
        ("texts_waiting", "Texts that wait to be embedded", status.texts_waiting),
        ("pages_used", "KV pages in use", status.pages_used),
        ("pages_total", "KV pages of the pool", status.pages_total),
        ("pages_cached", "KV pages not in use that can still be found", status.pages_cached),
        ("swapped", "Waiting sequences whose KV pages are on the host", status.swapped),
        ("host_pages_used", "KV pages in use on the host", status.host_pages_used),
        ("host_pages_total", "KV pages that the host has room for", status.host_pages_total),
        ("adapter_slots", "Slots for LoRA adapters", status.adapter_slots),
        ("adapters_held", "LoRA adapters in slots", status.adapters_held),
        ("adapter_joins", "Rows taken with an adapter so far", status.adapter_joins),
        ("adapter_hits", "Of these, whose adapter was in a slot", status.adapter_hits),
        ("adapter_loads", "Adapters read from the disk so far", status.adapter_loads),
        ("adapter_host_bytes", "Of adapters in the host's memory", status.adapter_host_bytes),
        ("compiles_after_warmup", "Compilations since ready", status.compiles_after_warmup),
        ("step_age_seconds", "Since the step loop last turned", status.step_age_s),
    ):
        yield GaugeMetricFamily(f"jaxserve_{name}", documentation, value)
