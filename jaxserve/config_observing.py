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
    """

    enabled: bool = True


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """Who is told when something is wrong.

    Attributes:
        resend_s: an alert that goes on is told again after so long; 0 for never.
    """

    resend_s: float = 0.0
