"""What is counted of requests, steps and the engine's status, and how it is shown."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import typing
from pathlib import Path

import pytest

from jaxserve.config import TelemetryConfig
from jaxserve.http.metrics import Metrics, create_shared
from jaxserve.http.metrics import families as f
from jaxserve.http.metrics.cells import Cells
from jaxserve.http.metrics.exposition import Text, label_text
from jaxserve.http.metrics.window import Window
from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import Asked, Outcome, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.types import DeviceInfo, ModelInfo
from tests.http.metrics.exposed import Exposed

VLLM = json.loads(
    (Path(__file__).parents[2] / "data" / "prometheus" / "vllm_dashboards.json").read_text()
)
MODEL = ModelInfo(name="tiny", max_context=1000, vocab_size=8, eos_token_ids=(1,), cache_groups=())
VLLM_LABELS = {"engine": "0", "model_name": "tiny"}


def step_stats(**fields) -> StepStats:
    """One device call; zeros where nothing is said."""
    hints = typing.get_type_hints(StepStats)
    return StepStats(**{name: "" if kind is str else 0 for name, kind in hints.items()} | fields)


def status(**fields) -> EngineStatus:
    """Of an engine that serves."""
    return EngineStatus(**{"state": "ready", "pid": 1, "step_age_s": 0.0, "model": MODEL} | fields)


def record(**fields) -> RequestRecord:
    """A request that was answered after 2 s, its first token after 0.2 s, 11 tokens in all."""
    values = {
        "request_id": "0" * 32,
        "route": "/v1/chat/completions",
        "arrived_ns": 10**9,
        "submitted_ns": 10**9 + 10,
        "first_token_ns": 1_200_000_000,
        "done_ns": 3 * 10**9,
        "decode_ns": 10**9,
        "decode_tokens": 10,
        "prompt_tokens": 100,
        "completion_tokens": 11,
        "cached_tokens": 64,
        "model": "tiny",
        "finish_reasons": ["stop"],
        "asked": Asked(max_tokens=20),
        "sequences": [
            SequenceRecord(
                queued_ns=1_010_000_000,
                scheduled_ns=1_060_000_000,
                first_token_ns=1_190_000_000,
                done_ns=2_900_000_000,
                output_tokens=11,
            )
        ],
    }
    return RequestRecord(**values | fields)


def exposed(metrics: Metrics) -> Exposed:
    return Exposed(metrics.render())


# ---------------------------------------------------------------------------- the engine


def test_hits_and_kept_pages_are_told():
    metrics = Metrics(lambda: status(pages_cached=7, pages_total=9))
    metrics.step(step_stats(prefix_lookup_tokens=100, prefix_hit_tokens=64))
    metrics.step(step_stats(prefix_lookup_tokens=20))
    lines = metrics.render().decode().splitlines()
    assert "jaxserve_prefix_lookup_tokens_total 120.0" in lines
    assert "jaxserve_prefix_hit_tokens_total 64.0" in lines
    assert "jaxserve_pages_cached 7.0" in lines
    assert "jaxserve_pages_capacity 9.0" in lines


def test_shed_sequences_are_told_by_reason():
    metrics = Metrics(lambda: status(shed={"priority": 3, "queue_full": 7}))
    text = metrics.render().decode()
    assert 'jaxserve_shed_total{reason="priority"} 3.0' in text
    assert 'jaxserve_shed_total{reason="queue_full"} 7.0' in text
    assert metrics.render().decode() == text  # a scrape counts nothing


def test_counters_of_the_engine_go_on_in_its_next_life():
    """A counter reset: they neither fall nor are counted twice."""
    now = status(adapter_joins=10, shed={"queue_full": 4})
    metrics = Metrics(lambda: now)
    for fields, joins, shed in (
        ({"pid": 1, "adapter_joins": 10, "shed": {"queue_full": 4}}, 10, 4),
        ({"pid": 1, "adapter_joins": 12, "shed": {"queue_full": 4}}, 12, 4),
        ({"pid": 1, "adapter_joins": 12, "shed": {"queue_full": 4}, "state": "restarting"}, 12, 4),
        ({"pid": 2, "state": "loading"}, 12, 4),
        ({"pid": 2, "adapter_joins": 30, "shed": {"queue_full": 1}}, 42, 5),
        ({"pid": 2, "adapter_joins": 31, "shed": {"queue_full": 1}}, 43, 5),
        ({"pid": 2, "adapter_joins": 5, "shed": {}}, 48, 5),  # began anew under the same id
    ):
        now = status(**fields)
        seen = exposed(metrics)
        assert seen.value("jaxserve_adapter_joins_total") == joins
        assert seen.value("jaxserve_shed_total", reason="queue_full") == shed


def test_only_worker_0_follows_the_engine_and_all_tell_it(tmp_path: Path):
    create_shared(tmp_path / "m", 2)
    now = status(adapter_loads=3)
    workers = [Metrics(lambda: now, tmp_path / "m", index) for index in range(2)]
    workers[0].followed()
    for _ in range(3):
        for worker in workers:
            assert exposed(worker).value("jaxserve_adapter_loads_total") == 3


def test_steps_are_counted_by_kind_and_the_bubble_apart_from_idleness():
    metrics = Metrics(status)
    ms = 1_000_000
    metrics.step(step_stats(program="mixed_r8_t64", device_ns=4 * ms, idle_ns=900 * ms, running=1))
    metrics.step(step_stats(program="decode_r8_k4", device_ns=2 * ms, idle_ns=3 * ms, running=1))
    metrics.step(step_stats(program="decode_r8", device_ns=2 * ms, idle_ns=5 * ms))  # the last
    metrics.step(step_stats(program="embed_t64_l8", device_ns=ms, idle_ns=700 * ms))
    metrics.step(step_stats(program="unheard_of", device_ns=ms, idle_ns=0))
    seen = exposed(metrics)
    counts = {
        kind: seen.value("jaxserve_step_seconds_count", kind=kind)
        for kind in ("mixed", "decode", "verify", "embed", "other")
    }
    assert counts == {"mixed": 1, "decode": 2, "verify": 0, "embed": 1, "other": 1}
    assert seen.value("jaxserve_step_seconds_sum", kind="decode") == pytest.approx(0.004)
    assert seen.value("jaxserve_step_idle_seconds_total") == pytest.approx(1.608)
    assert seen.value("jaxserve_step_bubble_seconds_total") == pytest.approx(0.008)


def test_rates_of_the_last_seconds_forget_what_is_older():
    window = Window(Cells())
    second = 10**9
    for at in range(100, 130):
        window.add(at * second + 5, 3.0, 10.0)
        window.add(at * second + 6, 4.0, 10.0)
    assert window.rates(130 * second) == (7.0, 20.0)
    assert window.rates(130 * second + 999_999_999) == (7.0, 20.0)
    assert window.rates(135 * second) == (3.5, 10.0)
    assert window.rates(140 * second) == (0.0, 0.0)  # no traffic
    window.add(500 * second, 100.0, 0.0)
    assert window.rates(500 * second + 1) == (0.0, 0.0)  # of whole seconds
    assert window.rates(501 * second) == (10.0, 0.0)


@pytest.mark.parametrize(
    ("device", "config", "flops", "num_bytes"),
    [
        (None, {}, None, None),
        (DeviceInfo(kind="cpu", count=1), {}, None, None),
        (DeviceInfo(kind="x", count=4, flops_per_s=5e12, bytes_per_s=1e11), {}, 2e13, 4e11),
        (DeviceInfo(kind="cpu", count=2), {"device_flops_per_s": 1e11}, 2e11, None),
        (
            DeviceInfo(kind="x", count=1, flops_per_s=5e12, bytes_per_s=1e11),
            {"device_bytes_per_s": 2e11},
            *(5e12, 2e11),
        ),
    ],
)
def test_use_of_the_device_is_told_where_its_peak_is_known(device, config, flops, num_bytes):
    metrics = Metrics(lambda: status(device=device), config=TelemetryConfig(**config))
    metrics.step(step_stats(program="decode_r1", flops=10**9, bytes=10**8))
    seen = exposed(metrics)
    for name, ratio, peak in (
        ("jaxserve_peak_flops_per_second", "jaxserve_mfu_ratio", flops),
        ("jaxserve_peak_bytes_per_second", "jaxserve_mbu_ratio", num_bytes),
    ):
        assert seen.has(name) == seen.has(ratio) == (peak is not None)
        if peak is not None:
            assert seen.value(name) == peak


# ---------------------------------------------------------------------------- requests


def test_an_answered_request_as_opentelemetry_counts_it():
    metrics = Metrics(status)
    metrics.ended(record())
    seen = exposed(metrics)
    labels = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "jaxserve",
        "gen_ai_request_model": "tiny",
    }
    assert seen.value("gen_ai_server_request_duration_seconds_sum", **labels) == 2.0
    assert seen.value("gen_ai_server_time_to_first_token_seconds_sum", **labels) == 0.2
    assert seen.value("gen_ai_server_time_per_output_token_seconds_sum", **labels) == 0.1
    for kind, tokens in (("input", 100), ("output", 11)):
        usage = labels | {"gen_ai_token_type": kind}
        assert seen.value("gen_ai_client_token_usage_sum", **usage) == tokens
    # Boundaries of the conventions, docs/gen-ai/gen-ai-metrics.md.
    for name, bounds in (
        (
            "gen_ai_server_request_duration_seconds",
            [
                0.01,
                0.02,
                0.04,
                0.08,
                0.16,
                0.32,
                0.64,
                1.28,
                2.56,
                5.12,
                10.24,
                20.48,
                40.96,
                81.92,
            ],
        ),
        (
            "gen_ai_server_time_to_first_token_seconds",
            [
                *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
                *(5.0, 7.5, 10.0),
            ],
        ),
        (
            "gen_ai_server_time_per_output_token_seconds",
            [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5],
        ),
        ("gen_ai_client_token_usage", [4.0**power for power in range(14)]),
    ):
        assert list(seen.buckets(name)) == [*bounds, math.inf]
    assert seen.buckets("gen_ai_server_request_duration_seconds")[1.28] == 0
    assert seen.buckets("gen_ai_server_request_duration_seconds")[2.56] == 1
    assert seen.buckets("gen_ai_server_time_per_output_token_seconds")[0.1] == 1


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"outcome": Outcome.FAILED, "error_code": "engine_failure"}, "engine_failure"),
        ({"outcome": Outcome.SHED, "error_code": "overloaded"}, "overloaded"),
        ({"outcome": Outcome.LEFT}, "cancelled"),
        ({"outcome": Outcome.FAILED}, "_OTHER"),
    ],
)
def test_a_request_that_was_not_answered_has_an_error_type_and_no_times(fields, error):
    metrics = Metrics(status)
    metrics.ended(record(finish_reasons=[], **fields))
    seen = exposed(metrics)
    (labels,) = [
        found
        for found in seen.labels("gen_ai_server_request_duration_seconds_count")
        if "error_type" in found
    ]
    assert labels["error_type"] == error
    assert seen.value("gen_ai_server_request_duration_seconds_count", **labels) == 1
    assert seen.value("jaxserve_time_per_output_token_seconds_count") == 0
    reason = "abort" if fields["outcome"] is Outcome.LEFT else "error"
    assert seen.value("jaxserve_finished_total", reason=reason) == 1
    assert seen.value("jaxserve_tenant_requests_total", outcome=fields["outcome"].value) == 1


def test_an_answer_of_one_token_has_no_time_per_token():
    metrics = Metrics(status)
    metrics.ended(record(decode_ns=0, decode_tokens=0, completion_tokens=1))
    seen = exposed(metrics)
    assert seen.value("jaxserve_time_per_output_token_seconds_count") == 0
    assert seen.value("jaxserve_time_per_output_token_seconds_sum") == 0
    assert seen.value("jaxserve_request_completion_tokens_count") == 1


def test_a_request_that_the_engine_never_saw_has_no_times_of_sequences():
    metrics = Metrics(status)
    metrics.ended(record(sequences=[SequenceRecord()]))
    seen = exposed(metrics)
    for name in ("queue", "prefill", "decode"):
        assert seen.value(f"jaxserve_{name}_seconds_count") == 0


def test_a_sequences_life_is_divided():
    metrics = Metrics(status)
    metrics.ended(record())
    seen = exposed(metrics)
    for name, seconds in (("queue", 0.05), ("prefill", 0.13), ("decode", 1.71)):
        assert seen.value(f"jaxserve_{name}_seconds_sum") == pytest.approx(seconds)


def test_tenants_of_the_key_file_have_series_from_the_start_and_the_rest_are_other():
    tenants = [f"t{number}" for number in range(5000)]
    config = TelemetryConfig(max_tenant_labels=20)
    metrics = Metrics(status, config=config, tenants=tenants)
    assert exposed(metrics).value("jaxserve_tenant_prompt_tokens_total", tenant="t0") == 0
    for tenant in tenants:
        metrics.ended(record(tenant=tenant))
    metrics.ended(record(tenant="", outcome=Outcome.REFUSED, error_code="invalid_api_key"))
    seen = exposed(metrics)
    shown = {labels.get("tenant") for labels in seen.labels("jaxserve_tenant_prompt_tokens_total")}
    assert shown == {*tenants[:20], "other", None}
    assert seen.value("jaxserve_tenant_prompt_tokens_total", tenant="t7") == 100
    assert seen.value("jaxserve_tenant_completion_tokens_total", tenant="t7") == 11
    assert seen.value("jaxserve_tenant_cached_tokens_total", tenant="t7") == 64
    done = {"outcome": "done", "tenant": "other"}
    assert seen.value("jaxserve_tenant_requests_total", **done) == 4980
    assert seen.value("jaxserve_tenant_requests_total", outcome="refused") == 1
    assert seen.value("jaxserve_metric_series_refused") == 0


def test_adapters_are_told_apart_up_to_a_bound_and_while_in_work():
    metrics = Metrics(lambda: status(adapter_slots=4), config=TelemetryConfig(max_adapter_labels=2))
    records = [record(adapter=f"a{number}", admitted_ns=5) for number in range(4)]
    for one in records:
        metrics.admitted(one)
    seen = exposed(metrics)
    assert seen.value("jaxserve_adapter_requests_in_flight", adapter="a0") == 1
    assert seen.value("jaxserve_adapter_requests_in_flight", adapter="other") == 2
    (labels,) = seen.labels("vllm:lora_requests_info")
    assert labels == {
        "max_lora": "4",
        "running_lora_adapters": "a0,a1,other",
        "waiting_lora_adapters": "",
    }
    for one in records:
        metrics.ended(one)
    metrics.ended(record(adapter="a0", outcome=Outcome.SHED))  # refused: it was never let in
    seen = exposed(metrics)
    assert seen.value("jaxserve_adapter_requests_in_flight", adapter="a0") == 0
    assert seen.value("jaxserve_adapter_requests_in_flight", adapter="other") == 0
    assert seen.value("jaxserve_adapter_completion_tokens_total", adapter="other") == 22
    assert seen.value("jaxserve_adapter_requests_total", adapter="a0", outcome="shed") == 1
    models = {
        labels["gen_ai_request_model"]
        for labels in seen.labels("gen_ai_server_request_duration_seconds_count")
    }
    assert models == {"a0", "a1", "other"}


# ---------------------------------------------------------------------------- how it is shown


def test_every_selection_of_boundaries_counts_as_if_it_alone_had_been():
    values = [random.Random(1).lognormvariate(-2, 3) for _ in range(2000)]
    values += [0.3, 0.01, 0.1, 1e6]  # on a boundary, and above all
    metrics = Metrics(lambda: status())
    for value in values:
        metrics.first_token(value)
        metrics.request_done(value)
    seen = exposed(metrics)
    for name, labels in (
        ("jaxserve_time_to_first_token_seconds", {}),
        ("jaxserve_request_duration_seconds", {}),
        ("vllm:time_to_first_token_seconds", VLLM_LABELS),
        ("vllm:e2e_request_latency_seconds", VLLM_LABELS),
    ):
        buckets = seen.buckets(name, **labels)
        assert len(buckets) > 15
        for bound, count in buckets.items():
            assert count == sum(value <= bound for value in values), (name, bound)
        assert seen.value(f"{name}_count", **labels) == len(values)
        assert seen.value(f"{name}_sum", **labels) == pytest.approx(sum(values))


def test_vllms_dashboards_find_each_of_their_series():
    metrics = Metrics(lambda: status(pages_used=30, pages_total=120, running=3, waiting=2))
    metrics.ended(record())
    seen = exposed(metrics)
    for dashboard, names in VLLM["dashboards"].items():
        for name in names:
            assert seen.has(name), f"{name} of {dashboard}"
            assert all(labels["model_name"] == "tiny" for labels in seen.labels(name))
    assert seen.value("vllm:num_requests_running", **VLLM_LABELS) == 3
    assert seen.value("vllm:num_requests_waiting", **VLLM_LABELS) == 2
    assert seen.value("vllm:kv_cache_usage_perc", **VLLM_LABELS) == 0.25
    assert seen.value("vllm:gpu_cache_usage_perc", **VLLM_LABELS) == 0.25
    stop = VLLM_LABELS | {"finished_reason": "stop"}
    assert seen.value("vllm:request_success_total", **stop) == 1
    assert seen.value("vllm:request_queue_time_seconds_sum", **VLLM_LABELS) == pytest.approx(0.05)
    assert seen.value("vllm:request_inference_time_seconds_sum", **VLLM_LABELS) == 1.84
    assert seen.value("vllm:request_params_max_tokens_sum", **VLLM_LABELS) == 20
    assert seen.value("vllm:request_prefill_kv_computed_tokens_sum", **VLLM_LABELS) == 36
    for name, bounds in VLLM["loggers"].items():
        if name != "source":
            assert list(seen.buckets(f"vllm:{name}")) == [*map(float, bounds), math.inf]
    tokens = list(seen.buckets("vllm:request_prompt_tokens"))  # up to the context
    assert tokens == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, math.inf]
    for name, kind in (
        *(("vllm:num_requests_running", "gauge"), ("vllm:prompt_tokens", "counter")),
        *(("vllm:request_success", "counter"), ("vllm:cache_config_info", "gauge")),
    ):
        assert seen.kinds[name] == kind


def test_calls_of_tools_are_stops_to_vllm():
    metrics = Metrics(status)
    metrics.ended(record(finish_reasons=["tool_calls", "stop", "length"]))
    seen = exposed(metrics)
    assert seen.value("jaxserve_finished_total", reason="tool_calls") == 1
    for reason, count in (("stop", 2), ("length", 1), ("abort", 0), ("error", 0)):
        labels = VLLM_LABELS | {"finished_reason": reason}
        assert seen.value("vllm:request_success_total", **labels) == count


def test_vllms_names_can_be_switched_off():
    metrics = Metrics(status, config=TelemetryConfig(vllm_metrics=False))
    metrics.ended(record())
    assert b"vllm:" not in metrics.render()


def test_before_the_engine_has_said_anything_there_is_no_vllm_and_no_failure():
    seen = exposed(Metrics(lambda: None))
    assert seen.value("jaxserve_engine_ready") == 0
    assert not seen.has("jaxserve_running")


def test_what_is_no_number_is_left_out():
    text = Text()
    for value in (math.nan, math.inf, -math.inf, 1.0):
        text.sample("x", "", value)
    assert text.encoded() == b"x 1.0\n"


def test_labels_are_escaped():
    value = 'a "quoted" \\ back\nslash'
    text = Text()
    text.head("x", "gauge", "A gauge")
    text.sample("x", label_text(("tenant",), (value,)), 2)
    assert Exposed(text.encoded()).value("x", tenant=value) == 2


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (prometheus)")
def test_promtool_has_nothing_to_say_but_of_vllms_own_names():
    def said(**config) -> list[str]:
        device = DeviceInfo(kind="x", count=2, flops_per_s=1e12, bytes_per_s=1e12)
        metrics = Metrics(
            lambda: status(device=device, adapter_slots=2), config=TelemetryConfig(**config)
        )
        metrics.request("/v1/completions", 200)
        metrics.admitted(record(adapter="a"))
        metrics.ended(record(adapter="a", tenant="acme"))
        metrics.step(step_stats(program="decode_r1"))
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=metrics.render(), capture_output=True
        )
        assert done.returncode in (0, 3), done.stderr
        return (done.stdout + done.stderr).decode().splitlines()

    assert said(vllm_metrics=False) == []
    assert all(line.startswith("vllm:") for line in said())


def test_families_are_in_the_order_of_their_labels():
    for family in f.FAMILIES.values():
        assert list(family.labels) == sorted(family.labels)
        assert family.size <= 64
