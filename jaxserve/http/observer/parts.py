"""Which parts the observer has, by the configuration: the one place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxserve.config import Config
from jaxserve.http.observer.ledger import LedgerPart, check_ledger, open_ledger
from jaxserve.http.observer.part import Part
from jaxserve.http.observer.tracing import make_tracing
from jaxserve.telemetry.tracing.settings import check_tracing
from jaxserve.http.observer.slo import make_slo
from jaxserve.telemetry.slo.objective import parse_objectives
from jaxserve.http.observer.alerts import make_alerts, make_baselines, source_name
from jaxserve.http.observer.part import Part
from jaxserve.telemetry.alerts.receivers import make_receivers

#: Has all workers know something: a topic, and its JSON.
Tell = Callable[[str, bytes], None]


def make_parts(config: Config, state: Path, tell: Tell) -> list[Part]:
    """The parts.

    Args:
        state: directory of what outlives this process.
        tell: `Observer.tell`.

    Raises:
        ConfigError: a setting of a part cannot be used.
    """
    parts: list[Part] = []
    if config.metering.enabled:
        ledger = open_ledger(config.metering, state)
        parts.append(LedgerPart(ledger, keep_days=config.metering.keep_days).part)
    return parts
    return [*make_tracing(config.tracing)]
    return [make_slo(config, state)]
    alerts = make_alerts(config, state)
    parts = [alerts.part]
    if config.alerts.degradation:
        parts.append(make_baselines(config, state, alerts.on_alert))
    return parts


def check_parts(config: Config) -> None:
    """Looks at the settings of all parts before anything is started.

    Raises:
        ConfigError: one cannot be used.
    """
    if config.metering.enabled:
        check_ledger(config.metering)
    check_tracing(config.tracing)
    parse_objectives(config.slo.objectives)
    make_receivers(config.alerts, source_name(config))
