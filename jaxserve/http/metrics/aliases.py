"""The same figures under vLLM's names, so that its dashboards and autoscalers work unchanged.

Names, labels and buckets are those of vllm/v1/metrics/loggers.py (github.com/vllm-project/vllm),
with the older names of what was renamed, which many dashboards still have.
vLLM counts sequences where it says requests; so do these. What has no like here (sleep levels,
multimodal and external caches, KV block lifetimes) is left out rather than shown as 0.

Switched by `telemetry.vllm_metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from jaxserve.http.metrics import families as f
from jaxserve.http.metrics.cells import Cells
from jaxserve.http.metrics.exposition import Text, label_text
from jaxserve.protocol.status import EngineStatus
from jaxserve.types import ModelInfo

#: The one engine of a server, as vLLM numbers it.
_ENGINE = "0"
#: Counters: vLLM's name, meaning, ours.
_COUNTERS = (
    ("prompt_tokens", "Prompt tokens", f.PROMPT_TOKENS),
    ("generation_tokens", "Generated tokens", f.OUTPUT_TOKENS),
    ("num_preemptions", "Preemptions", f.PREEMPTIONS),
    ("prefix_cache_queries", "Tokens looked up in the prefix cache", f.PREFIX_LOOKUPS),
    ("prefix_cache_hits", "Tokens found in the prefix cache", f.PREFIX_HITS),
    ("gpu_prefix_cache_queries", "Older name of prefix_cache_queries", f.PREFIX_LOOKUPS),
    ("gpu_prefix_cache_hits", "Older name of prefix_cache_hits", f.PREFIX_HITS),
    ("prompt_tokens_cached", "Prompt tokens found in the cache", f.CACHED_TOKENS),
    ("spec_decode_num_draft_tokens", "Draft tokens", f.DRAFTS),
    ("spec_decode_num_accepted_tokens", "Accepted draft tokens", f.DRAFTS_ACCEPTED),
)
#: Histograms: vLLM's name, meaning, ours, its boundaries.
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "Time to first token", f.TTFT, f.VLLM_FIRST_TOKEN),
    ("inter_token_latency_seconds", "Between tokens", f.ITL, f.VLLM_OUTPUT_TOKEN),
    (
        *("time_per_output_token_seconds", "Older name of inter_token_latency_seconds"),
        *(f.ITL, f.VLLM_OUTPUT_TOKEN),
    ),
    (
        *("request_time_per_output_token_seconds", "Mean time per output token of a request"),
        *(f.TPOT, f.VLLM_OUTPUT_TOKEN),
    ),
    ("e2e_request_latency_seconds", "From arrival to the end", f.E2E, f.VLLM_REQUEST),
    ("request_queue_time_seconds", "Time in the queue", f.QUEUE, f.VLLM_REQUEST),
    ("request_inference_time_seconds", "Time running", f.INFERENCE, f.VLLM_REQUEST),
    ("request_prefill_time_seconds", "Time in prefill", f.PREFILL, f.VLLM_REQUEST),
    ("request_decode_time_seconds", "Time in decode", f.DECODE, f.VLLM_REQUEST),
    ("request_prompt_tokens", "Prompt tokens of a request", f.REQUEST_PROMPT, f.VLLM_TOKENS),
    (
        *("request_generation_tokens", "Tokens generated of a request"),
        *(f.REQUEST_COMPLETION, f.VLLM_TOKENS),
    ),
    (
        *("request_max_num_generation_tokens", "Most tokens generated of a request's choices"),
        *(f.MOST_GENERATED, f.VLLM_TOKENS),
    ),
    ("request_params_n", "Choices asked for", f.CHOICES, f.VLLM_CHOICES),
    ("request_params_max_tokens", "max_tokens asked for", f.MAX_TOKENS, f.VLLM_TOKENS),
    (
        *("request_prefill_kv_computed_tokens", "Prompt tokens that were not found in the cache"),
        *(f.PREFILL_COMPUTED, f.VLLM_TOKENS),
    ),
    ("iteration_tokens_total", "Tokens of a step", f.STEP_TOKENS, f.VLLM_STEP_TOKENS),
)
#: Why a choice ended: our word, and vLLM's where it has another.
_REASONS = {"tool_calls": "stop"}
#: Reasons that are there from the start.
_ALL_REASONS = ("stop", "length", "abort", "error")


class VllmNames:
    """Writes them.

    Args:
        page_size: tokens a KV page.
    """

    def __init__(self, cells: Cells, page_size: int) -> None:
        self._cells = cells
        self._page_size = page_size

    def write(self, text: Text, status: EngineStatus, model: ModelInfo) -> None:
        """All families, for a model that is loaded."""
        labels = label_text(("engine", "model_name"), (_ENGINE, model.name))
        for name, documentation, value in _gauges(status):
            text.head(f"vllm:{name}", "gauge", documentation)
            text.sample(f"vllm:{name}", labels, value)
        for name, documentation, family in _COUNTERS:
            text.head(f"vllm:{name}_total", "counter", documentation)
            text.sample(f"vllm:{name}_total", labels, f.totals_of(self._cells, family)[0])
        for name, documentation, family, bounds in _HISTOGRAMS:
            shown = tuple(map(float, bounds))
            if bounds is f.VLLM_TOKENS:  # as vLLM, those that the context allows
                shown = tuple(bound for bound in shown if bound <= model.max_context)
            text.head(f"vllm:{name}", "histogram", documentation)
            counts, total = f.cumulative(family, f.totals_of(self._cells, family), shown)
            text.histogram(f"vllm:{name}", labels, shown, counts, total)
        self._write_reasons(text, labels)
        self._write_infos(text, status)

    def _write_reasons(self, text: Text, labels: str) -> None:
        counts: dict[str, float] = dict.fromkeys(_ALL_REASONS, 0.0)
        for series in self._cells.series(f.FINISHED.name):
            (reason,) = series.labels
            reason = _REASONS.get(reason, reason)
            counts[reason] = counts.get(reason, 0.0) + self._cells.totals(series)[0]
        text.head("vllm:request_success_total", "counter", "Requests that ended, by reason")
        for reason, count in counts.items():
            more = label_text(("finished_reason",), (reason,))
            text.sample("vllm:request_success_total", f"{labels},{more}", count)

    def _write_infos(self, text: Text, status: EngineStatus) -> None:
        values = {
            "block_size": str(self._page_size),
            "enable_prefix_caching": "True",
            "engine": _ENGINE,
            "num_cpu_blocks": str(status.host_pages_total),
            "num_gpu_blocks": str(status.pages_total),
        }
        text.head("vllm:cache_config_info", "gauge", "Of the KV cache")
        text.sample("vllm:cache_config_info", label_text(values, values.values()), 1)
        if not status.adapter_slots:
            return
        running = sorted(
            series.labels[0]
            for series in self._cells.series(f.ADAPTER_IN_FLIGHT.name)
            if self._cells.totals(series)[0] > 0
        )
        values = {
            "max_lora": str(status.adapter_slots),
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": "",
        }
        labels = label_text(values, values.values(), keep_empty=True)  # gateways look for all
        text.head("vllm:lora_requests_info", "gauge", "Adapters of requests in work; the time")
        text.sample("vllm:lora_requests_info", labels, time.time())


def _gauges(status: EngineStatus) -> Iterator[tuple[str, str, float]]:
    used = status.pages_used / status.pages_total if status.pages_total else 0.0
    host = status.host_pages_used / status.host_pages_total if status.host_pages_total else 0.0
    yield "num_requests_running", "Sequences that run", status.running
    yield "num_requests_waiting", "Sequences that wait", status.waiting
    yield "num_requests_swapped", "Of those that wait, with pages on the host", status.swapped
    yield "kv_cache_usage_perc", "KV pages in use; 1 is all", used
    yield "gpu_cache_usage_perc", "Older name of kv_cache_usage_perc", used
    yield "cpu_cache_usage_perc", "KV pages in use on the host; 1 is all", host
