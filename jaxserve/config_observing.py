"""Configuration of all that watches the server; sections of `jaxserve.config.Config`."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    endpoint: str = ""


@dataclass(frozen=True, kw_only=True)
class SloConfig:
    """What was promised.

    Attributes:
        objectives: "p99 ttft < 100 ms", "error_rate < 0.1%" and the like; none where empty.
    """

    objectives: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MeteringConfig:
    """What requests cost, and where that is written down.

    Attributes:
        enabled: whether costs are computed and kept.
    """

    enabled: bool = True


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """Who is told when something is wrong.

    Attributes:
        resend_s: an alert that goes on is told again after so long; 0 for never.
    """

    resend_s: float = 0.0
