"""Configuration of all that watches the server; sections of `jaxserve.config.Config`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What all that watches the server has in common: the observer's process.

    Attributes:
        enabled: whether there is one; without it no traces, SLOs, costs, alerts or console.
        state_dir: where what outlives the server is kept; where empty, a directory for the port
            under ~/.local/state/jaxserve; nothing is kept for port 0.
        report_interval_s: how often an HTTP worker tells the observer what it has seen.
        flush_interval_s: how often the observer keeps it: what a crash of the machine may lose.
        max_records: requests and steps that wait for the observer in a worker, at most; beyond it
            the oldest are dropped, and counted.
        vllm_metrics: whether /metrics has vLLM's names too, for its dashboards and autoscalers.
        max_tenant_labels: tenants that /metrics tells apart, the key file's first; the others are
            counted together.
        max_adapter_labels: LoRA adapters that it tells apart, those used first.
        device_flops_per_s, device_bytes_per_s: what one device computes and its memory moves at
            best, for MFU and MBU; where 0, by the kind of device, and not told where that is not
            known. `python -m jaxserve bench engine` measures both.
    """

    enabled: bool = True
    state_dir: str = ""
    report_interval_s: float = 0.1
    flush_interval_s: float = 1.0
    max_records: int = 200_000
    vllm_metrics: bool = True
    max_tenant_labels: int = 50
    max_adapter_labels: int = 16
    device_flops_per_s: float = 0.0
    device_bytes_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """Spans of requests, sent by OTLP.

    Attributes:
        endpoint: of a collector, "http://HOST:4317" for one; nothing is traced where empty.
        protocol: "grpc", or "http" (protobuf; "/v1/traces" is added where the endpoint has no
            path).
        headers: "name=value" of each, sent with the spans: a collector's key, say.
        sample_ratio: share of the requests that are kept whatever they are like.
        follow_caller: whether a caller's `traceparent` decides that instead, where there is one.
        slow_ms: a request that takes as long is kept in any case; 0 for never.
        slow_ttft_ms: the same, until its first token.
        service_name: what the spans say that this is.
        attributes: "name=value" of each, what else they say of it.
        record_content: whether spans have what is asked and answered, in plain text.
        max_spans: that wait for the collector; beyond it the oldest are dropped, and counted.
        timeout_s: how long a batch may take to be sent.
    """

    endpoint: str = ""
    protocol: str = "grpc"
    headers: tuple[str, ...] = field(default=(), metadata={"secret": True})
    sample_ratio: float = 0.1
    follow_caller: bool = True
    slow_ms: float = 60_000.0
    slow_ttft_ms: float = 5_000.0
    service_name: str = "jaxserve"
    attributes: tuple[str, ...] = ()
    record_content: bool = False
    max_spans: int = 20_000
    timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class SloConfig:
    """What was promised.

    Attributes:
        objectives: "p99 ttft < 100 ms", "error_rate < 0.1%" and the like (docs/slo.md); none where
            empty.
        overdue_s: an unfinished request without a first token (or, where none is generated, an
            end) counts against the availability after so long; 0 for never.
        min_bad_events: bad requests in an alert's long window below which nobody is told.
    """

    objectives: tuple[str, ...] = ()
    overdue_s: float = 5.0
    min_bad_events: int = 10


@dataclass(frozen=True, kw_only=True)
class MeteringConfig:
    """What requests cost, and where that is written down.

    Attributes:
        enabled: whether costs are computed and kept.
        ledger: where: a file of SQLite, or postgresql://USER:PASSWORD@HOST:PORT/DATABASE, which
            several servers may share; where empty, a file in telemetry.state_dir.
        keep_days: rows of single requests, and sums that tell users and hours apart, are deleted
            after so long; 0 keeps them. Sums by day, without users, are always kept.
        currency: of all prices, three letters.
        hardware_per_hour: price of the machine that this server has, for an hour; 0: unpriced.
        energy_per_kwh: price of a kilowatt-hour; 0: unpriced.
        pue: energy that the building takes for each that the devices take.
        carbon_g_per_kwh: CO2 of a kilowatt-hour, in grams.
        power: what measures energy: "auto" (NVML, else RAPL, else the model), "nvml", "rapl" or
            "modelled"; the model steps in wherever nothing can be read.
        gpus: those that are this server's, by NVML's index; all where empty.
        device: row of the power table, for the model.
        devices: how many of it.
        idle_watts, busy_watts: of one device, instead of the table's; 0: the table's. The same for
            both is a constant: for TPUs, which nothing measures.
        over_budget_status: of a refusal because a hard budget is spent: "402" or "429".
    """

    enabled: bool = True
    currency: str = "USD"
    hardware_per_hour: float = 0.0
    energy_per_kwh: float = 0.0
    pue: float = 1.0
    carbon_g_per_kwh: float = 0.0
    power: str = "auto"
    gpus: tuple[str, ...] = ()
    device: str = "cpu"
    devices: int = 1
    idle_watts: float = 0.0
    busy_watts: float = 0.0
    over_budget_status: str = "402"
    ledger: str = field(default="", metadata={"secret": True})
    keep_days: int = 0


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """Who is told when something is wrong (docs/alerts.md).

    Entries of receivers may begin with the least severity that they are told of, as in
    "critical:https://…": info, warning (where nothing is said), error or critical.

    Attributes:
        pagerduty: integration keys of PagerDuty services (Events API v2).
        pagerduty_url: of its API; "https://events.eu.pagerduty.com" for accounts in Europe.
        slack: addresses of Slack's incoming webhooks.
        webhooks: addresses that incidents are POSTed to as JSON.
        webhook_secret: with which these are signed (HMAC-SHA256); not signed where empty.
        alertmanagers: addresses of Prometheus Alertmanagers.
        source: what this server is called in alerts; HOST:PORT where empty.
        hold_s: an incident is over once its cause has been calm for so long.
        resend_s: an incident that goes on is told again after so long; 0 for never.
        degradation: whether a server that is slower than it was is an incident.
        min_shift: the least part by which it must be slower.
        sample_s: how long what a baseline's sample is made of is collected.
        baseline_samples: samples of a baseline.
    """

    pagerduty: tuple[str, ...] = field(default=(), metadata={"secret": True})
    pagerduty_url: str = "https://events.pagerduty.com"
    slack: tuple[str, ...] = field(default=(), metadata={"secret": True})
    webhooks: tuple[str, ...] = field(default=(), metadata={"secret": True})
    webhook_secret: str = field(default="", metadata={"secret": True})
    alertmanagers: tuple[str, ...] = field(default=(), metadata={"secret": True})
    source: str = ""
    hold_s: float = 60.0
    resend_s: float = 0.0
    degradation: bool = True
    min_shift: float = 0.03
    sample_s: float = 10.0
    baseline_samples: int = 500
