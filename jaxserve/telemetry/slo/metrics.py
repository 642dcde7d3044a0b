"""The SLOs for Prometheus: counters that rules are made over (`rules.py`), and how it stands.

Every series is there from the start, at 0: what comes first is then seen as an increase. Nothing is
ever NaN; a share of no traffic is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxserve.telemetry.slo.burn import SEVERITIES, WINDOWS_S, burn_rate
from jaxserve.telemetry.slo.compliance import Compliance
from jaxserve.telemetry.slo.judge import APART, BAD, Verdict
from jaxserve.telemetry.slo.report import budget_left, compliance_share, goodput

EVENTS = "jaxserve_slo_events_total"
OVERDUE = "jaxserve_slo_overdue"


def families(compliance: Compliance) -> Iterator[Metric]:
    """All families of the SLOs."""
    yield from _counters(compliance)
    yield from _standing(compliance)
    rates = goodput(compliance, 300)
    yield GaugeMetricFamily(
        "jaxserve_slo_goodput_requests_per_second",
        "Requests that met all their objectives, over 5 minutes",
        rates["requests_per_s"],
    )
    yield GaugeMetricFamily(
        "jaxserve_slo_goodput_tokens_per_second",
        "Their output tokens, over 5 minutes",
        rates["tokens_per_s"],
    )
    yield GaugeMetricFamily(
        "jaxserve_slo_state_kept",
        "1 if the counts would survive a restart",
        0 if compliance.file.problem else 1,
    )


def _counters(compliance: Compliance) -> Iterator[Metric]:
    events = CounterMetricFamily(
        EVENTS.removesuffix("_total"),
        "Requests by objective: good, bad, or apart",
        labels=["objective", "verdict"],
    )
    causes = CounterMetricFamily(
        "jaxserve_slo_bad_events",
        "Bad requests by objective and cause",
        labels=["objective", "cause"],
    )
    overdue = GaugeMetricFamily(
        OVERDUE, "Unfinished requests that count as bad at present", labels=["objective"]
    )
    for objective, tally in compliance.by_objective():
        totals = tally.totals
        events.add_metric([objective.name, "good"], totals[Verdict.GOOD])
        events.add_metric([objective.name, "bad"], sum(totals[verdict] for verdict in BAD))
        for verdict in APART:
            events.add_metric([objective.name, verdict.name.lower()], totals[verdict])
        for verdict in BAD:
            causes.add_metric([objective.name, verdict.name.lower()], totals[verdict])
        overdue.add_metric([objective.name], tally.overdue)
    yield events
    yield causes
    yield overdue
    yield CounterMetricFamily(
        "jaxserve_slo_good_requests",
        "Requests that met all their objectives",
        compliance.book.num_good_requests,
    )
    yield CounterMetricFamily(
        "jaxserve_slo_good_tokens", "Their output tokens", compliance.book.num_good_tokens
    )


def _standing(compliance: Compliance) -> Iterator[Metric]:
    by_objective = ["objective"]
    target = GaugeMetricFamily("jaxserve_slo_target", "Promised share", labels=by_objective)
    share = GaugeMetricFamily(
        "jaxserve_slo_compliance", "Share of good requests over the period", labels=by_objective
    )
    left = GaugeMetricFamily(
        "jaxserve_slo_budget_left", "Share of the error budget that is left", labels=by_objective
    )
    burn = GaugeMetricFamily(
        "jaxserve_slo_burn_rate",
        "How fast the error budget burns; 1 uses it up in its period",
        labels=["objective", "window"],
    )
    firing = GaugeMetricFamily(
        "jaxserve_slo_alert", "1 while the alert is on", labels=["objective", "severity"]
    )
    for objective, tally in compliance.by_objective():
        name, count = objective.name, tally.count(objective.period_s)
        target.add_metric([name], float(objective.target))
        if (value := compliance_share(count)) is not None:
            share.add_metric([name], value)
        left.add_metric([name], budget_left(objective, count))
        for window, window_s in WINDOWS_S.items():
            burn.add_metric([name, window], burn_rate(objective, tally.count(window_s)))
        for severity in SEVERITIES:
            firing.add_metric(
                [name, severity], int(compliance.alerts.is_firing(objective, severity))
            )
    yield from (target, share, left, burn, firing)
