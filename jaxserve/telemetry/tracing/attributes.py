"""What spans say beside their times, under the names of `semconv`."""

from __future__ import annotations

from typing import Any

from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.telemetry import semconv


def request_attributes(record: RequestRecord, operation: str) -> dict[str, Any]:
    """Of a request's own span; what was not said, or is not known, is left out."""
    asked = record.asked
    texts: dict[str, Any] = {
        semconv.OPERATION: operation,
        semconv.PROVIDER_NAME: semconv.PROVIDER,
        semconv.REQUEST_MODEL: record.model,
        semconv.REQUEST_STOP: asked.stop,
        semconv.RESPONSE_ID: record.response_id,
        semconv.RESPONSE_MODEL: record.model if record.status == 200 else "",
        semconv.RESPONSE_FINISH_REASONS: record.finish_reasons,
        semconv.HTTP_METHOD: "POST",
        semconv.HTTP_ROUTE: record.route,
        semconv.USER: record.user,
        semconv.ERROR_TYPE: _error_type(record),
        semconv.INPUT_MESSAGES: record.asked_content,
        semconv.OUTPUT_MESSAGES: record.answered_content,
        "jaxserve.request_id": record.request_id,
        "jaxserve.adapter": record.adapter,
        "jaxserve.tenant": record.tenant,
        "jaxserve.key": record.key,
        "jaxserve.outcome": record.outcome.value,
    }
    numbers: dict[str, Any] = {
        semconv.REQUEST_MAX_TOKENS: asked.max_tokens,
        semconv.REQUEST_TEMPERATURE: asked.temperature,
        semconv.REQUEST_TOP_P: asked.top_p,
        semconv.REQUEST_TOP_K: asked.top_k,
        semconv.REQUEST_FREQUENCY_PENALTY: asked.frequency_penalty,
        semconv.REQUEST_PRESENCE_PENALTY: asked.presence_penalty,
        semconv.REQUEST_SEED: asked.seed,
        semconv.REQUEST_CHOICES: asked.choices if asked.choices > 1 else None,
        semconv.REQUEST_STREAM: record.streamed or None,
        semconv.HTTP_STATUS: record.status or None,
        semconv.USAGE_INPUT: record.prompt_tokens if record.submitted_ns else None,
        semconv.USAGE_OUTPUT: record.completion_tokens if record.first_token_ns else None,
        semconv.USAGE_CACHED: record.cached_tokens or None,
        semconv.USAGE_REASONING: record.reasoning_tokens or None,
        semconv.RESPONSE_FIRST_CHUNK: None if record.ttft_ns is None else record.ttft_ns / 1e9,
        "jaxserve.priority": record.priority or None,
        "jaxserve.texts": record.texts or None,
    }
    return {name: value for name, value in texts.items() if value} | {
        name: value for name, value in numbers.items() if value is not None
    }


def _error_type(record: RequestRecord) -> str:
    if record.error_code or record.outcome in (Outcome.DONE, Outcome.LEFT):
        return record.error_code
    return record.outcome.value


def sequence_attributes(phase: str, record: SequenceRecord) -> dict[str, int]:
    """Of one phase of a choice, in the engine."""
    counts: dict[str, int] = {}
    match phase:
        case "queue":
            counts = {"replays": record.replays}
        case "prefill":
            counts = {
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "device_ns": record.prefill_device_ns,
            }
        case "decode":
            counts = {
                "output_tokens": record.output_tokens,
                "recomputed_tokens": record.recomputed_tokens,
                "swapped_tokens": record.swapped_tokens,
                "drafted_tokens": record.drafted_tokens,
                "discarded_tokens": record.discarded_tokens,
                "preemptions": record.preemptions,
                "device_ns": record.decode_device_ns,
                "wasted_device_ns": record.wasted_device_ns,
            }
    return {f"jaxserve.{name}": count for name, count in counts.items() if count}
