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
    """

    enabled: bool = True
    state_dir: str = ""
    report_interval_s: float = 0.1
    flush_interval_s: float = 1.0
    max_records: int = 200_000


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
        currency: of all prices, three letters.
        hardware_per_hour: price of the machine that this server has, for an hour; 0: unpriced.
        energy_per_kwh: price of a kilowatt-hour; 0: unpriced.
        pue: energy that the building takes for each that the devices take.
        carbon_g_per_kwh: CO2 of a kilowatt-hour, in grams.
        power: what measures energy: "auto" (NVML, else RAPL, else the model), "nvml", "rapl" or
            "modelled"; the model steps in wherever nothing can be read.
        gpus: those that are this server's, by NVML's index; all where empty.
        device: row of the power table, for the model.
        devices: of that kind, how many.
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


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """Who is told when something is wrong.

    Attributes:
        resend_s: an alert that goes on is told again after so long; 0 for never.
    """

    resend_s: float = 0.0
