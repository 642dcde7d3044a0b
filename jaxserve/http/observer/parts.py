"""Which parts the observer has, by the configuration: the one place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from jaxserve.config import Config
from jaxserve.http.keyfile import load_keys
from jaxserve.http.observer.alerts import (
    Alerts,
    make_alerts,
    make_baselines,
    source_name,
)
from jaxserve.http.observer.console import console_part
from jaxserve.http.observer.deployment import SayNews, make_deployment
from jaxserve.http.observer.ledger import LedgerPart, check_ledger, open_ledger
from jaxserve.http.observer.metering import Metering
from jaxserve.http.observer.part import Part
from jaxserve.http.observer.slo import make_slo
from jaxserve.http.observer.tracing import make_tracing
from jaxserve.metering.power.power import check_power
from jaxserve.metering.prices import make_prices
from jaxserve.telemetry.alerts.incident import Severity
from jaxserve.telemetry.alerts.receivers import make_receivers
from jaxserve.telemetry.baselines.identity import Deployment
from jaxserve.telemetry.slo.burn import PAGE, OnAlert
from jaxserve.telemetry.slo.objective import parse_objectives
from jaxserve.telemetry.tracing.settings import check_tracing

#: Has all workers know something: a topic, and its JSON.
Tell = Callable[[str, bytes], None]


def make_parts(config: Config, state: Path, tell: Tell, news: SayNews) -> list[Part]:
    """The parts.

    Args:
        state: directory of what outlives this process.
        tell: `Observer.tell`. news: `Observer.news`.

    Raises:
        ConfigError: a setting of a part cannot be used.
    """
    alerts = make_alerts(config, state)
    parts = [
        *make_tracing(config.tracing),
        make_slo(config, state, _slo_alerts(alerts)),
        alerts.part,
        console_part(config=config.telemetry),
    ]
    if config.alerts.degradation:
        deployment = Deployment.of(config)
        parts.append(make_baselines(config, deployment, state, alerts.on_alert))
        parts.append(make_deployment(deployment, state, news))
    if config.metering.enabled:
        parts += _metering(config, state, tell, alerts)
    return parts


def check_parts(config: Config) -> None:
    """Looks at the settings of all parts before anything is started.

    Raises:
        ConfigError: one cannot be used.
    """
    check_tracing(config.tracing)
    parse_objectives(config.slo.objectives)
    make_receivers(config.alerts, source_name(config))
    if config.metering.enabled:
        check_ledger(config.metering)
        make_prices(config.metering)
        check_power(config.metering)


def _slo_alerts(alerts: Alerts) -> OnAlert:
    """Where burn rates are told: a page wakes somebody up, a ticket waits for the morning."""

    def on_alert(
        key: str, firing: bool, severity: str, title: str, details: dict[str, Any]
    ) -> None:
        told = Severity.CRITICAL if severity == PAGE else Severity.WARNING
        alerts.on_alert(key, firing, told, title, {k: str(v) for k, v in details.items()})

    return on_alert


def _metering(config: Config, state: Path, tell: Tell, alerts: Alerts) -> list[Part]:
    """What prices requests and writes them down, and what answers from there."""
    metering = config.metering
    ledger = open_ledger(metering, state, metering.currency)

    def on_passed(tenant: str, limit: str, passed: bool, spent: Decimal, most: Decimal) -> None:
        alerts.on_alert(
            f"budget:{tenant}:{limit}",
            passed,
            Severity.ERROR if limit == "hard" else Severity.WARNING,
            f"tenant {tenant} has spent its {limit} budget of the month",
            {"tenant": tenant, "spent": f"{spent:.6g}", "budget": f"{most:.6g}"},
        )

    prices = Metering(
        metering,
        ledger,
        tell,
        state,
        budgets=load_keys(config.http).budgets,
        on_passed=on_passed,
    )
    reports = LedgerPart(ledger, metering.currency, metering.keep_days, is_fed=lambda: prices.keeps)
    return [prices.part, reports.part]
