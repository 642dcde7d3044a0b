"""What is counted of a request at its end, from its record (`protocol.records`).

By tenant and adapter, as OpenTelemetry's conventions want it, and as vLLM shows it. Labels that
callers choose are bounded: beyond the bound, "other". Places of cells are looked up once for all
series that belong together (a tenant's, an operation's), so that a request costs little.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.config import TelemetryConfig
from jaxserve.http.metrics import families as f
from jaxserve.http.metrics.cells import Cells
from jaxserve.http.metrics.exemplars import Exemplars
from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.telemetry import semconv

#: Error types, and reasons for which choices end, that may have series of their own.
_MAX_ERRORS = 40
_MAX_REASONS = 16
#: Of choices that did not end by themselves: as vLLM calls it.
_ABORT, _ERROR = "abort", "error"
#: Names of models that are remembered; a process has served one or two.
_MAX_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class _Histogram:
    """Where a histogram's cells are."""

    first: int
    sum: int
    bounds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Caller:
    """Places of a tenant's counters, or an adapter's."""

    outcomes: dict[Outcome, int]
    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True, slots=True)
class _Operation:
    """Places of what OpenTelemetry counts of one operation with one model."""

    duration: dict[str, _Histogram]
    ttft: _Histogram
    tpot: _Histogram
    inputs: _Histogram
    outputs: _Histogram


class RequestCounts:
    """Counts requests of one HTTP process.

    Args:
        tenants: that are known from the start; their series begin at 0, so that no increase is
            missed.
        exemplars: where latencies of traced requests are kept.
    """

    def __init__(
        self,
        cells: Cells,
        config: TelemetryConfig,
        tenants: Sequence[str],
        exemplars: Exemplars,
    ) -> None:
        self._cells = cells
        self._exemplars = exemplars
        self._own = cells.own
        self._config = config
        self._tenants: dict[str, _Caller] = {}
        self._adapters: dict[str, _Caller] = {}
        self._operations: dict[tuple[str, str], _Operation] = {}
        self._finished: dict[str, int] = {}
        for tenant in tenants or ("",):
            self._tenant(tenant)
        for reason in ("stop", "length", _ABORT, _ERROR):
            self._finish(reason)
        self._cached = self._at(f.CACHED_TOKENS)
        self._recomputed = self._at(f.RECOMPUTED_TOKENS)
        self._discarded = self._at(f.DISCARDED_TOKENS)
        self._queue = self._histogram(f.QUEUE)
        self._prefill = self._histogram(f.PREFILL)
        self._decode = self._histogram(f.DECODE)
        self._inference = self._histogram(f.INFERENCE)
        self._choices = self._histogram(f.CHOICES)
        self._most = self._histogram(f.MOST_GENERATED)
        self._computed = self._histogram(f.PREFILL_COMPUTED)
        self._max_tokens = self._histogram(f.MAX_TOKENS)

    def admitted(self, record: RequestRecord) -> None:
        """It was let in, and its record says when."""
        if record.adapter:
            self._own[self._at(f.ADAPTER_IN_FLIGHT, self._adapter_label(record.adapter))] += 1

    def ended(self, record: RequestRecord) -> None:
        """It has ended."""
        self._count(self._tenants.get(record.tenant) or self._tenant(record.tenant), record)
        if record.adapter:
            self._count(self._adapters.get(record.adapter) or self._adapter(record.adapter), record)
            if record.admitted_ns:
                self._own[self._at(f.ADAPTER_IN_FLIGHT, self._adapter_label(record.adapter))] -= 1
        self._own[self._cached] += record.cached_tokens
        self._count_gen_ai(record)
        self._count_finished(record)
        for sequence in record.sequences:
            self._count_sequence(sequence)
        if record.sequences and not record.texts and self._config.vllm_metrics:
            self._count_vllm(record)

    def _count(self, caller: _Caller, record: RequestRecord) -> None:
        own = self._own
        own[caller.outcomes[record.outcome]] += 1
        own[caller.prompt] += record.prompt_tokens
        own[caller.completion] += record.completion_tokens
        own[caller.cached] += record.cached_tokens

    def _count_gen_ai(self, record: RequestRecord) -> None:
        key = record.route, record.adapter or record.model
        places = self._operations.get(key) or self._operation(record)
        error = "" if record.outcome is Outcome.DONE else self._error(record)
        duration = places.duration.get(error)
        if duration is None:
            duration = self._duration(places, record, error)
        trace_id = record.trace_id if record.sampled else ""
        self._observe(duration, (record.done_ns - record.arrived_ns) / 1e9, trace_id)
        if error:
            return
        ttft_ns, tpot_ns = record.ttft_ns, record.tpot_ns
        if ttft_ns is not None:
            self._observe(places.ttft, ttft_ns / 1e9, trace_id)
        if tpot_ns is not None:
            self._observe(places.tpot, tpot_ns / 1e9, trace_id)
        self._observe(places.inputs, record.prompt_tokens)
        if record.completion_tokens:
            self._observe(places.outputs, record.completion_tokens)

    def _count_finished(self, record: RequestRecord) -> None:
        """Every choice has one reason; a request that none had begun counts as one."""
        for reason in record.finish_reasons:
            self._own[self._finished.get(reason) or self._finish(reason)] += 1
        if record.outcome is Outcome.DONE or not record.submitted_ns:
            return
        missing = max(1, record.asked.choices - len(record.finish_reasons))
        self._own[self._finished[_ABORT if record.outcome is Outcome.LEFT else _ERROR]] += missing

    def _count_sequence(self, sequence: SequenceRecord) -> None:
        """Times that have not happened are 0, and are not counted."""
        queued_ns, scheduled_ns = sequence.queued_ns, sequence.scheduled_ns
        first_ns, done_ns = sequence.first_token_ns, sequence.done_ns
        if queued_ns and scheduled_ns >= queued_ns:
            self._observe(self._queue, (scheduled_ns - queued_ns) / 1e9)
        if scheduled_ns and first_ns >= scheduled_ns:
            self._observe(self._prefill, (first_ns - scheduled_ns) / 1e9)
        if first_ns and done_ns >= first_ns:
            self._observe(self._decode, (done_ns - first_ns) / 1e9)
        if scheduled_ns and done_ns >= scheduled_ns and self._config.vllm_metrics:
            self._observe(self._inference, (done_ns - scheduled_ns) / 1e9)
        self._own[self._recomputed] += sequence.recomputed_tokens
        self._own[self._discarded] += sequence.discarded_tokens

    def _count_vllm(self, record: RequestRecord) -> None:
        self._observe(self._choices, record.asked.choices)
        self._observe(self._most, max(one.output_tokens for one in record.sequences))
        self._observe(self._computed, max(0, record.prompt_tokens - record.cached_tokens))
        if record.asked.max_tokens:
            self._observe(self._max_tokens, record.asked.max_tokens)

    def _observe(self, histogram: _Histogram, value: float, trace_id: str = "") -> None:
        own = self._own
        bucket = bisect_left(histogram.bounds, value)
        own[histogram.first + bucket] += 1
        own[histogram.sum] += value
        if trace_id:
            self._exemplars.keep(histogram.first, bucket, trace_id, value)

    # ------------------------------------------------------------------ places

    def _tenant(self, tenant: str) -> _Caller:
        """The anonymous one, who has no name, takes no one's place."""
        bound = self._config.max_tenant_labels
        label = tenant and self._cells.label("label:tenant", tenant, bound)
        caller = _Caller(
            outcomes={each: self._at(f.TENANT_REQUESTS, each.value, label) for each in Outcome},
            prompt=self._at(f.TENANT_PROMPT, label),
            completion=self._at(f.TENANT_COMPLETION, label),
            cached=self._at(f.TENANT_CACHED, label),
        )
        return _remember(self._tenants, tenant, caller)

    def _adapter(self, adapter: str) -> _Caller:
        label = self._adapter_label(adapter)
        caller = _Caller(
            outcomes={each: self._at(f.ADAPTER_REQUESTS, label, each.value) for each in Outcome},
            prompt=self._at(f.ADAPTER_PROMPT, label),
            completion=self._at(f.ADAPTER_COMPLETION, label),
            cached=self._at(f.ADAPTER_CACHED, label),
        )
        return _remember(self._adapters, adapter, caller)

    def _adapter_label(self, adapter: str) -> str:
        return self._cells.label("label:adapter", adapter, self._config.max_adapter_labels)

    def _names(self, record: RequestRecord) -> tuple[str, str, str]:
        """Operation, provider and model, as labels."""
        model = self._adapter_label(record.adapter) if record.adapter else record.model
        return semconv.OPERATIONS.get(record.route, "other"), semconv.PROVIDER, model

    def _operation(self, record: RequestRecord) -> _Operation:
        names = self._names(record)
        places = _Operation(
            duration={"": self._histogram(f.GEN_AI_SERVER_DURATION, "", *names)},
            ttft=self._histogram(f.GEN_AI_SERVER_TTFT, *names),
            tpot=self._histogram(f.GEN_AI_SERVER_TPOT, *names),
            inputs=self._histogram(f.GEN_AI_USAGE, *names, "input"),
            outputs=self._histogram(f.GEN_AI_USAGE, *names, "output"),
        )
        return _remember(self._operations, (record.route, record.adapter or record.model), places)

    def _duration(self, places: _Operation, record: RequestRecord, error: str) -> _Histogram:
        place = self._histogram(f.GEN_AI_SERVER_DURATION, error, *self._names(record))
        places.duration[error] = place
        return place

    def _error(self, record: RequestRecord) -> str:
        """error.type of what was not answered."""
        if record.outcome is Outcome.LEFT:
            return "cancelled"
        return self._cells.label("label:error", record.error_code or "_OTHER", _MAX_ERRORS)

    def _finish(self, reason: str) -> int:
        label = self._cells.label("label:reason", reason, _MAX_REASONS)
        return _remember(self._finished, reason, self._at(f.FINISHED, label))

    def _histogram(self, family: f.Family, *labels: str) -> _Histogram:
        first = self._at(family, *labels)
        return _Histogram(first, first + family.size - 1, family.bounds)

    def _at(self, family: f.Family, *labels: str) -> int:
        return self._cells.claim(family.name, labels, family.size)


def _remember[K, V](places: dict[K, V], key: K, value: V) -> V:
    """Puts it in; keys are what callers chose, so not for ever."""
    if len(places) < _MAX_REMEMBERED:
        places[key] = value
    return value
