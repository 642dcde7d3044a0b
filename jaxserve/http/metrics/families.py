"""What is counted: name, kind, meaning, labels and buckets of every series that the cells hold.

A histogram is counted once, in buckets fine enough for all who show it: ours, OpenTelemetry's and
vLLM's boundaries differ, and each is a selection of the counted ones (`shown`). docs/metrics.md has
the same table for readers; a test holds it to this one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.http.metrics.cells import Cells
from jaxserve.telemetry import semconv

#: Boundaries that the `jaxserve_*` histograms of times show.
TIME_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
STEP_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
#: OpenTelemetry's.
GEN_AI_DURATION = semconv.BUCKETS[semconv.SERVER_REQUEST_DURATION]
GEN_AI_FIRST_TOKEN = semconv.BUCKETS[semconv.SERVER_TIME_TO_FIRST_TOKEN]
GEN_AI_OUTPUT_TOKEN = semconv.BUCKETS[semconv.SERVER_TIME_PER_OUTPUT_TOKEN]
GEN_AI_TOKENS = semconv.BUCKETS[semconv.CLIENT_TOKEN_USAGE]
#: vLLM's, of vllm/v1/metrics/loggers.py.
VLLM_FIRST_TOKEN = (*GEN_AI_FIRST_TOKEN, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
VLLM_OUTPUT_TOKEN = (*GEN_AI_OUTPUT_TOKEN, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
VLLM_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
VLLM_TOKENS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
VLLM_CHOICES = (1, 2, 5, 10, 20)
VLLM_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def _union(*bounds: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({float(bound) for each in bounds for bound in each}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One name.

    Attributes:
        name: a counter's ends in _total.
        kind: "counter", "gauge" (here the sum over workers) or "histogram".
        bounds: of a histogram, as it is counted; shown: as it is shown.
        hidden: is only shown under another name (`aliases`).
        sums: is not counted itself: it is the sum of this one's series…
        where: …that have this label's value, as the last of their labels; of all where empty.
    """

    name: str
    kind: str
    documentation: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    shown: tuple[float, ...] = ()
    hidden: bool = False
    sums: Family | None = None
    where: str = ""

    @property
    def size(self) -> int:
        """Cells of a series: a histogram's buckets, the last open, and its sum."""
        return len(self.bounds) + 2 if self.kind == "histogram" else 1


FAMILIES: dict[str, Family] = {}


def _counter(name: str, documentation: str, *labels: str) -> Family:
    return _add(
        Family(
            name=f"{name}_total",
            kind="counter",
            documentation=documentation,
            labels=tuple(sorted(labels)),
        )
    )


def _histogram(
    name: str,
    documentation: str,
    shown: Sequence[float],
    *others: Sequence[float],
    labels: tuple[str, ...] = (),
    hidden: bool = False,
) -> Family:
    return _add(
        Family(
            name=name,
            kind="histogram",
            documentation=documentation,
            labels=tuple(sorted(labels)),
            bounds=_union(shown, *others),
            shown=_union(shown),
            hidden=hidden,
        )
    )


def _sum_of(
    sums: Family, name: str, documentation: str, shown: Sequence[float], where: str = ""
) -> Family:
    return _add(
        Family(
            name=name,
            kind="histogram",
            documentation=documentation,
            bounds=sums.bounds,
            shown=_union(shown),
            sums=sums,
            where=where,
        )
    )


def _add(family: Family) -> Family:
    assert family.name not in FAMILIES
    FAMILIES[family.name] = family
    return family


def ours(name: str, documentation: str, *labels: str) -> Family:
    """A counter of ours."""
    return _counter(f"jaxserve_{name}", documentation, *labels)


IN_FLIGHT = _add(
    Family(name="jaxserve_requests_in_flight", kind="gauge", documentation="Requests in work")
)
REQUESTS = ours("requests", "Requests answered", "route", "status")
RATE_LIMITED = ours("rate_limited", "Requests refused by a rate limit", "kind", "scope")
SHED = ours(
    "shed",
    "Requests refused, pushed out or cut short because of load; by a full queue, sequences",
    "reason",
)

PROMPT_TOKENS = ours("prompt_tokens", "Prompt tokens submitted")
OUTPUT_TOKENS = ours("output_tokens", "Tokens generated")
CACHED_TOKENS = ours("cached_tokens", "Prompt tokens of ended requests found in the cache")
RECOMPUTED_TOKENS = ours("recomputed_tokens", "Positions run again after a preemption or restart")
DISCARDED_TOKENS = ours("discarded_tokens", "Tokens sampled or drafted that were not emitted")
EMBEDDED_TEXTS = ours("embedded_texts", "Texts embedded, or pairs scored")
EMBEDDED_TOKENS = ours("embedded_tokens", "Their tokens")
FINISHED = ours("finished", "Choices that ended, by reason", "reason")

STEPS = ours("steps", "Device calls")
STEP_DEVICE = ours("step_device_seconds", "Device time of steps")
STEP_IDLE = ours("step_idle_seconds", "Time that the device waited between steps")
STEP_BUBBLE = ours(
    "step_bubble_seconds", "Of the idle time, that with sequences to run: the host's"
)
STEP_FLOPS = ours("step_flops", "Floating-point operations of steps, counted from shapes")
STEP_BYTES = ours("step_bytes", "Bytes that steps move, counted from shapes")
STEP_PREFILL = ours("step_prefill_tokens", "Prompt tokens run on the device")
STEP_DECODE = ours("step_decode_tokens", "Decoded tokens run on the device")
STEP_PADDING = ours("step_padding_tokens", "Padding run on the device")
DRAFTS = ours("draft_tokens", "Next tokens guessed and verified")
DRAFTS_ACCEPTED = ours("draft_accepted_tokens", "Guessed tokens that were right")
PREEMPTIONS = ours("preemptions", "Sequences set back to make room")
PREFIX_LOOKUPS = ours("prefix_lookup_tokens", "Known tokens of sequences when they took a row")
PREFIX_HITS = ours("prefix_hit_tokens", "Of these, tokens whose KV was found in the cache")
PAGES_SAVED = ours("pages_saved", "KV pages copied to the host")
PAGES_LOADED = ours("pages_loaded", "KV pages copied back from the host")
RESTARTS = ours("engine_restarts", "Starts of the engine after its death")
REPLAYED = ours("requests_replayed", "Requests that went on in another engine")
QUARANTINED = ours(
    "requests_quarantined", "Requests not run any more since they ended the engine alone"
)
ADAPTER_JOINS = ours("adapter_joins", "Rows taken with an adapter")
ADAPTER_HITS = ours("adapter_hits", "Of these, whose adapter was in a slot")
ADAPTER_LOADS = ours("adapter_loads", "Adapters read from the disk")

TENANT_REQUESTS = ours("tenant_requests", "Requests of a tenant, by their end", "outcome", "tenant")
TENANT_PROMPT = ours("tenant_prompt_tokens", "Prompt tokens of a tenant", "tenant")
TENANT_COMPLETION = ours("tenant_completion_tokens", "Tokens generated for a tenant", "tenant")
TENANT_CACHED = ours("tenant_cached_tokens", "Prompt tokens of a tenant that were found", "tenant")
ADAPTER_REQUESTS = ours("adapter_requests", "Requests with an adapter", "adapter", "outcome")
ADAPTER_PROMPT = ours("adapter_prompt_tokens", "Prompt tokens with an adapter", "adapter")
ADAPTER_COMPLETION = ours("adapter_completion_tokens", "Tokens of an adapter", "adapter")
ADAPTER_CACHED = ours("adapter_cached_tokens", "Prompt tokens found, with an adapter", "adapter")
ADAPTER_IN_FLIGHT = _add(
    Family(
        name="jaxserve_adapter_requests_in_flight",
        kind="gauge",
        documentation="Requests let in with an adapter that have not ended",
        labels=("adapter",),
    )
)

TTFT = _histogram(
    *("jaxserve_time_to_first_token_seconds", "From arrival to the first token"),
    *(TIME_BOUNDS, VLLM_FIRST_TOKEN),
)
ITL = _histogram(
    *("jaxserve_inter_token_seconds", "Between tokens of a choice"),
    *(TIME_BOUNDS, VLLM_OUTPUT_TOKEN),
)
E2E = _histogram(
    *("jaxserve_request_duration_seconds", "From arrival to the last token"),
    *(TIME_BOUNDS, VLLM_REQUEST),
)
QUEUE = _histogram(
    *("jaxserve_queue_seconds", "Of a sequence, from its place in the queue to its row"),
    *(TIME_BOUNDS, VLLM_REQUEST),
)
PREFILL = _histogram(
    *("jaxserve_prefill_seconds", "Of a sequence, from its row to its first token"),
    *(TIME_BOUNDS, VLLM_REQUEST),
)
DECODE = _histogram(
    *("jaxserve_decode_seconds", "Of a sequence, from its first token to its end"),
    *(TIME_BOUNDS, VLLM_REQUEST),
)
STEP = _histogram(
    *("jaxserve_step_seconds", "Device time of a step, by kind of program"),
    STEP_BOUNDS,
    labels=("kind",),
)

_OPERATION = tuple(
    name.replace(".", "_")
    for name in (semconv.OPERATION, semconv.PROVIDER_NAME, semconv.REQUEST_MODEL)
)
GEN_AI_SERVER_DURATION = _histogram(
    *("gen_ai_server_request_duration_seconds", "Until the last byte, or the error"),
    GEN_AI_DURATION,
    labels=(*_OPERATION, "error_type"),
)
GEN_AI_SERVER_TTFT = _histogram(
    *("gen_ai_server_time_to_first_token_seconds", "Until the first token, of answered requests"),
    GEN_AI_FIRST_TOKEN,
    labels=_OPERATION,
)
GEN_AI_SERVER_TPOT = _histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Per token after the first, of answered requests",
    *(GEN_AI_OUTPUT_TOKEN, TIME_BOUNDS, VLLM_OUTPUT_TOKEN),
    labels=_OPERATION,
)
GEN_AI_USAGE = _histogram(
    *("gen_ai_client_token_usage", "Of answered requests, their tokens"),
    *(GEN_AI_TOKENS, VLLM_TOKENS),
    labels=(*_OPERATION, "gen_ai_token_type"),
)
TPOT = _sum_of(
    GEN_AI_SERVER_TPOT,
    "jaxserve_time_per_output_token_seconds",
    "Of an answered request, its time per token after the first; none where there was one token",
    TIME_BOUNDS,
)
REQUEST_PROMPT = _sum_of(
    GEN_AI_USAGE,
    *("jaxserve_request_prompt_tokens", "Of an answered request, its prompt tokens"),
    GEN_AI_TOKENS[:11],
    where="input",
)
REQUEST_COMPLETION = _sum_of(
    GEN_AI_USAGE,
    *("jaxserve_request_completion_tokens", "Of an answered request, the tokens generated"),
    GEN_AI_TOKENS[:11],
    where="output",
)

# Only shown under vLLM's names.
INFERENCE = _histogram("inference_seconds", "", VLLM_REQUEST, hidden=True)
PREFILL_COMPUTED = _histogram("prefill_computed_tokens", "", VLLM_TOKENS, hidden=True)
MOST_GENERATED = _histogram("most_generated_tokens", "", VLLM_TOKENS, hidden=True)
MAX_TOKENS = _histogram("max_tokens", "", VLLM_TOKENS, hidden=True)
CHOICES = _histogram("choices", "", VLLM_CHOICES, hidden=True)
STEP_TOKENS = _histogram("step_tokens", "", VLLM_STEP_TOKENS, hidden=True)

# Cells that are no series by themselves: each worker's own view, or a window of time.
LEVEL = _add(Family(name="overload_level", kind="gauge", documentation="", hidden=True))
WAIT = _add(Family(name="estimated_wait", kind="gauge", documentation="", hidden=True))
STORE_DOWN = _add(
    Family(
        name="jaxserve_limit_store_down",
        kind="gauge",
        documentation="HTTP processes that cannot reach the shared store of rate limits",
    )
)


@functools.cache
def selection(bounds: tuple[float, ...], shown: tuple[float, ...]) -> tuple[int, ...]:
    """Of each shown boundary, its place among the counted ones."""
    return tuple(bounds.index(bound) for bound in shown)


def totals_of(cells: Cells, family: Family) -> list[float]:
    """The cells of a family without labels, all workers' together."""
    if family.sums is None:
        (series,) = cells.series(family.name)
        return cells.totals(series)
    totals = [0.0] * family.size
    for series in cells.series(family.sums.name):
        if not family.where or series.labels[-1] == family.where:
            found = cells.totals(series)
            totals = [total + cell for total, cell in zip(totals, found, strict=True)]
    return totals


def cumulative(
    family: Family, totals: Sequence[float], shown: tuple[float, ...]
) -> tuple[list[float], float]:
    """A histogram as it is shown.

    Args:
        totals: of its cells.

    Returns:
        For each boundary, and for all, what lies below; and the sum of what was observed.
    """
    counts, total = [], 0.0
    for count in totals[:-1]:
        total += count
        counts.append(total)
    places = selection(family.bounds, shown)
    return [*(counts[place] for place in places), total], totals[-1]
