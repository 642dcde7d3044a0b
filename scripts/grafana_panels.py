"""The rows and panels of the Grafana dashboard, which `grafana_dashboard` writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        queries: legend and PromQL; $S stands for the selector.
        unit: Grafana's.
        kind: "timeseries" or "stat".
        width, height: in the grid of 24.
        limits: where a stat turns yellow and red; none where empty.
        stacked: whether its series add up to something.
    """

    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    limits: tuple[float, ...] = ()
    stacked: bool = False
    top: float | None = None


def stat(title: str, about: str, query: str, unit: str, *limits: float, width: int = 3) -> Panel:
    """A number."""
    return Panel(title, about, (("", query),), unit, "stat", width, 4, limits)


def quantile(part: float, name: str, by: str = "") -> str:
    """Below which so large a part of a histogram lies."""
    labels = f"le, {by}" if by else "le"
    return (
        f"histogram_quantile({part:g}, sum by ({labels}) "
        f"(rate({name}_bucket{{$S}}[$__rate_interval])))"
    )


def quantiles(title: str, about: str, name: str, by: str = "", unit: str = "s") -> Panel:
    """p50, p90, p99 of a histogram."""
    legend = f" {{{{{by}}}}}" if by else ""
    percents = (50, 90, 99)
    queries = tuple((f"p{p}{legend}", quantile(p / 100, name, by)) for p in percents)
    return Panel(title, about, queries, unit)


def rate(name: str, by: str = "", **labels: str) -> str:
    """What a counter grows by each second."""
    more = "".join(f",{label}{value}" for label, value in labels.items())
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}{{$S{more}}}[$__rate_interval]))"


def total(name: str) -> str:
    """The sum of a gauge over servers."""
    return f"sum(jaxserve_{name}{{$S}})"


def share(part: str, whole: str) -> str:
    """A ratio that is nothing, not NaN, where the whole is 0."""
    return f"{part} / ({whole} > 0)"


BUSY = "avg(rate(jaxserve_step_device_seconds_total{$S}[$__rate_interval]))"
BUBBLE = "avg(rate(jaxserve_step_bubble_seconds_total{$S}[$__rate_interval]))"
WORK = '=~"/v1/(chat/completions|completions|responses|embeddings|score|rerank)"'
ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            stat("Serving", "Servers that are ready.", "sum(jaxserve_engine_ready{$S})", "short"),
            stat("Running", "Sequences that run.", total("running"), "short"),
            stat("Waiting", "Sequences that wait.", total("waiting"), "short", 10, 100),
            stat("Tokens/s", "Tokens generated.", rate("jaxserve_output_tokens_total"), "short"),
            stat(
                *("TTFT p99", "From arrival to the first token."),
                quantile(0.99, "jaxserve_time_to_first_token_seconds"),
                *("s", 1, 5),
            ),
            stat(
                *("TPOT p99", "Time per token after the first."),
                quantile(0.99, "jaxserve_time_per_output_token_seconds"),
                *("s", 0.1, 0.5),
            ),
            stat(
                *("KV pages", "Of the pool, those in use."),
                share(total("pages_used"), total("pages_capacity")),
                *("percentunit", 0.9, 0.97),
            ),
            stat(
                *("Errors", "Of requests for work, those answered with 5xx."),
                share(
                    f"({rate('jaxserve_requests_total', route=WORK, status='=~"5.."')} or "
                    "vector(0))",
                    rate("jaxserve_requests_total", route=WORK),
                ),
                *("percentunit", 0.01, 0.05),
            ),
        ),
    ),
    (
        "Latency",
        (
            quantiles(
                *("Time to first token", "From the request's arrival, before its body is read."),
                "jaxserve_time_to_first_token_seconds",
            ),
            quantiles(
                *("Time per output token", "Of a request, after its first token."),
                "jaxserve_time_per_output_token_seconds",
            ),
            quantiles("Between tokens", "Gaps in a choice.", "jaxserve_inter_token_seconds"),
            quantiles(
                *("Request", "From arrival to the last token."),
                "jaxserve_request_duration_seconds",
            ),
            Panel(
                *("Where a sequence's time goes", "Mean of sequences that ended."),
                tuple(
                    (
                        name,
                        share(
                            rate(f"jaxserve_{name}_seconds_sum"),
                            rate(f"jaxserve_{name}_seconds_count"),
                        ),
                    )
                    for name in ("queue", "prefill", "decode")
                ),
                *("s",),
                stacked=True,
            ),
            Panel(
                *("By operation, p99", "OpenTelemetry's gen_ai.server.request.duration."),
                (
                    (
                        "{{gen_ai_operation_name}} {{gen_ai_request_model}}",
                        quantile(
                            *(0.99, "gen_ai_server_request_duration_seconds"),
                            "gen_ai_operation_name, gen_ai_request_model",
                        ),
                    ),
                ),
                "s",
            ),
        ),
    ),
    (
        "Traffic",
        (
            Panel(
                *("Requests", "Answered a second, by status."),
                (("{{status}}", rate("jaxserve_requests_total", "status", route=WORK)),),
                *("reqps",),
                stacked=True,
            ),
            Panel(
                *("Tokens", "A second."),
                (
                    ("generated", rate("jaxserve_output_tokens_total")),
                    ("of prompts", rate("jaxserve_prompt_tokens_total")),
                    ("of prompts, found", rate("jaxserve_cached_tokens_total")),
                    ("embedded", rate("jaxserve_embedded_tokens_total")),
                ),
            ),
            Panel(
                *("Why choices end", "A second."),
                (("{{reason}}", rate("jaxserve_finished_total", "reason")),),
                stacked=True,
            ),
            quantiles(
                *("Length of prompts", "Tokens.", "jaxserve_request_prompt_tokens"),
                unit="short",
            ),
            Panel(
                *("Refused and shed", "A second: by rate limits, and because of load."),
                (
                    (
                        "limit: {{scope}} {{kind}}",
                        rate("jaxserve_rate_limited_total", "scope, kind"),
                    ),
                    ("load: {{reason}}", rate("jaxserve_shed_total", "reason")),
                ),
                stacked=True,
            ),
            Panel(
                *("Load", "What is given up (0 to 3), and how long a new request would wait."),
                (
                    ("level", "max(jaxserve_overload_level{$S})"),
                    ("estimated wait, s", "max(jaxserve_estimated_wait_seconds{$S})"),
                ),
            ),
        ),
    ),
    (
        "Scheduler and memory",
        (
            Panel(
                *("Sequences", "That run, wait, and wait with their pages on the host."),
                tuple((name, total(name)) for name in ("running", "waiting", "swapped")),
            ),
            Panel(
                *("KV pages", "Of the pool: in use, and free but still findable."),
                (
                    ("in use", share(total("pages_used"), total("pages_capacity"))),
                    ("findable", share(total("pages_cached"), total("pages_capacity"))),
                    ("host", share(total("host_pages_used"), total("host_pages_capacity"))),
                ),
                *("percentunit",),
                top=1,
            ),
            Panel(
                *("Found instead of computed", "Of known tokens, by the prefix cache."),
                (
                    (
                        "hits",
                        share(
                            rate("jaxserve_prefix_hit_tokens_total"),
                            rate("jaxserve_prefix_lookup_tokens_total"),
                        ),
                    ),
                ),
                *("percentunit",),
                top=1,
            ),
            Panel(
                *("Preemption", "Sequences set back, pages copied, positions run again; a second."),
                (
                    ("preemptions", rate("jaxserve_preemptions_total")),
                    ("pages saved", rate("jaxserve_pages_saved_total")),
                    ("pages loaded", rate("jaxserve_pages_loaded_total")),
                    ("recomputed tokens", rate("jaxserve_recomputed_tokens_total")),
                ),
            ),
            Panel(
                *("Drafts", "Of guessed tokens, those that were right."),
                (
                    (
                        "accepted",
                        share(
                            rate("jaxserve_draft_accepted_tokens_total"),
                            rate("jaxserve_draft_tokens_total"),
                        ),
                    ),
                ),
                *("percentunit",),
                top=1,
            ),
            Panel(
                *("Work of steps", "Tokens a second on the device."),
                tuple(
                    (name, rate(f"jaxserve_step_{name}_tokens_total"))
                    for name in ("decode", "prefill", "padding")
                ),
                stacked=True,
            ),
        ),
    ),
    (
        "Device",
        (
            quantiles(
                *("Step", "Device time, by kind of program."), "jaxserve_step_seconds", "kind"
            ),
            Panel(
                *(
                    "MFU and MBU",
                    "FLOPs and bytes counted from shapes, beside the peak, by server.",
                ),
                (
                    ("MFU {{instance}}", "jaxserve_mfu_ratio{$S}"),
                    ("MBU {{instance}}", "jaxserve_mbu_ratio{$S}"),
                ),
                *("percentunit",),
                top=1,
            ),
            Panel(
                *("The device's time", "Busy; waiting for the host with work there; without work."),
                (
                    ("busy", BUSY),
                    ("host bubble", BUBBLE),
                    ("no work", f"clamp_min(1 - {BUSY} - {BUBBLE}, 0)"),
                ),
                *("percentunit",),
                stacked=True,
                top=1,
            ),
            Panel(
                *("Steps", "A second, by kind."),
                (("{{kind}}", rate("jaxserve_step_seconds_count", "kind")),),
                stacked=True,
            ),
            Panel(
                *("Should stay 0", "Compilations after warm-up; the engine's restarts in 1 h."),
                (
                    ("compilations {{instance}}", "jaxserve_compiles_after_warmup{$S}"),
                    (
                        "restarts {{instance}}",
                        "increase(jaxserve_engine_restarts_total{$S}[1h])",
                    ),
                ),
            ),
            Panel(
                *("Step loop", "Since it last turned."),
                (("{{instance}}", "jaxserve_step_age_seconds{$S}"),),
                "s",
            ),
        ),
    ),
    (
        "Tenants and adapters",
        (
            Panel(
                *("Tokens by tenant", "Generated a second; the anonymous one has no name."),
                (("{{tenant}}", rate("jaxserve_tenant_completion_tokens_total", "tenant")),),
                stacked=True,
            ),
            Panel(
                *("Requests by tenant", "That were answered, a second."),
                (
                    (
                        "{{tenant}}",
                        rate("jaxserve_tenant_requests_total", "tenant", outcome='="done"'),
                    ),
                ),
                *("reqps",),
                stacked=True,
            ),
            Panel(
                *("Not served, by tenant", "Shed, limited, expired, failed; a second."),
                (
                    (
                        "{{tenant}} {{outcome}}",
                        rate(
                            "jaxserve_tenant_requests_total",
                            "tenant, outcome",
                            outcome='=~"shed|limited|expired|failed"',
                        ),
                    ),
                ),
                *("reqps",),
            ),
            Panel(
                *("Tokens by adapter", "Generated a second."),
                (("{{adapter}}", rate("jaxserve_adapter_completion_tokens_total", "adapter")),),
                stacked=True,
            ),
            Panel(
                *("Adapter slots", "That hold one, and all."),
                (("held", total("adapters_held")), ("slots", total("adapter_slots"))),
            ),
            Panel(
                *("Adapters found in a slot", "Of rows taken with one."),
                (
                    (
                        "hits",
                        share(
                            rate("jaxserve_adapter_hits_total"),
                            rate("jaxserve_adapter_joins_total"),
                        ),
                    ),
                ),
                *("percentunit",),
                top=1,
            ),
        ),
    ),
    (
        "Observer",
        (
            Panel(
                *("Observer", "Whether it answered the scrape."),
                (("{{instance}}", "jaxserve_observer_up{$S}"),),
            ),
            Panel(
                *("Records", "Taken in a second, and dropped because it did not keep up."),
                (
                    ("recorded", rate("jaxserve_observer_requests_total")),
                    ("dropped", rate("jaxserve_observer_dropped_total")),
                ),
            ),
            Panel(
                *("Scrape", "How long /metrics took."),
                (("{{instance}}", "scrape_duration_seconds{$S}"),),
                "s",
            ),
        ),
    ),
)
