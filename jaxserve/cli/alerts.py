"""`jaxserve alerts test`: tells all receivers of an incident that is none, and that it is over."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.http.observer.alerts import source_name
from jaxserve.telemetry.alerts.courier import DeliveryError
from jaxserve.telemetry.alerts.incident import Change, Incident, Notice, Severity
from jaxserve.telemetry.alerts.receivers import make_receivers


def tell_all(config: Config) -> int:
    """Prints a line a receiver; returns the exit status: 1 if one did not take it.

    Raises:
        ConfigError: there is no receiver, or an entry is wrong.
    """
    source = source_name(config)
    receivers = make_receivers(config.alerts, source)
    if not receivers:
        raise ConfigError(
            "there is nobody to tell: give alerts.pagerduty, alerts.slack, alerts.webhooks or "
            "alerts.alertmanagers"
        )
    now_s = time.time()
    incident = Incident(
        key="test",
        severity=Severity.CRITICAL,
        title="A test of alerts: nothing is wrong",
        details={"sent by": "jaxserve alerts test"},
        started_s=now_s,
    )
    status = 0
    for receiver in receivers:
        try:
            receiver.send(Notice(id=f"test-{now_s:.0f}-1", change=Change.FIRING, incident=incident))
            over = replace(incident, ended_s=max(time.time(), now_s))
            receiver.send(Notice(id=f"test-{now_s:.0f}-2", change=Change.RESOLVED, incident=over))
        except DeliveryError as error:
            status = 1
            sys.stdout.write(f"{receiver.name}: {error.reason}\n")
        else:
            sys.stdout.write(f"{receiver.name}: has it\n")
    return status
