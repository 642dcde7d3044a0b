"""The SLOs as a part of the observer (`telemetry.slo`)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from jaxserve.config import Config
from jaxserve.http.observer.messages import Answer, Question
from jaxserve.http.observer.part import Part
from jaxserve.telemetry.slo.burn import OnAlert, log_alert
from jaxserve.telemetry.slo.compliance import Compliance
from jaxserve.telemetry.slo.metrics import families
from jaxserve.telemetry.slo.report import report, report_text
from jaxserve.telemetry.slo.timeline import read_boot


def make_slo(config: Config, state: Path, on_alert: OnAlert = log_alert) -> Part:
    """The part.

    Args:
        state: directory where its counts are kept.
        on_alert: is told when an alert begins and ends.

    Raises:
        ConfigError: an objective cannot be read.
    """
    compliance = Compliance(
        config.slo,
        state,
        max_again=config.telemetry.max_records * config.http.workers,
        life=_server_life(),
        on_alert=on_alert,
    )

    async def tick() -> None:
        compliance.tick()

    async def close() -> None:
        compliance.close()

    async def answer(question: Question) -> Answer:
        compliance.tick()
        document = report(compliance)
        if question.query.get("format") == "text":
            text = report_text(document).encode()
            return Answer(content_type="text/plain; charset=utf-8", body=text)
        return Answer(body=msgspec.json.encode(document))

    return Part(
        name="slo",
        begun=compliance.begun,
        first_token=compliance.first_token,
        ended=compliance.ended,
        tick=tick,
        flush=compliance.flush,
        asks={"slo": answer},
        metrics=lambda: families(compliance),
        close=close,
    )


def _server_life() -> str:
    """Names this run of the server, whose supervisor is our parent: requests end with it."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return f"{read_boot()} {parent}"
    return f"{read_boot()} {parent} {stat.rpartition(')')[2].split()[19]}"  # when it started
