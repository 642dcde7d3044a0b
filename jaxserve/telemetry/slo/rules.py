"""Prometheus rules that say the same as the alerts in process (`burn.py`).

Recording rules count the good and the bad requests of each window, over all servers that are
scraped; alerts compare products, never a quotient, so that no traffic is 0 and nothing is NaN.
`increase` sees through a counter that begins again at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from jaxserve.config import SloConfig
from jaxserve.telemetry.slo.burn import RULES, SEVERITIES, WINDOW_NAMES, WINDOWS_S, BurnRule
from jaxserve.telemetry.slo.metrics import EVENTS, OVERDUE
from jaxserve.telemetry.slo.objective import Objective, parse_objectives

_HEAD = """\
# Burn-rate alerts of jaxserve's SLOs, made by `python -m jaxserve slo rules`.
# They agree with the alerts in process (docs/slo.md); make them anew when slo.objectives changes.
"""
_ALERTS = {"page": "JaxserveErrorBudgetBurnsFast", "ticket": "JaxserveErrorBudgetBurns"}


def make_rules(config: SloConfig) -> str:
    """The rules of a configuration as a YAML file.

    Raises:
        ConfigError: an objective cannot be read.
    """
    objectives = parse_objectives(config.objectives)
    # In one group, so that alerts see what was recorded in the same evaluation.
    rules = _recordings() + _alerts(objectives, config.min_bad_events)
    document = {"groups": [{"name": "jaxserve_slo", "rules": rules}]}
    return _HEAD + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)


def _recordings() -> list[dict[str, Any]]:
    """By window: good, bad with what is overdue, and both."""
    rules = []
    for window in WINDOWS_S:
        good, bad = (
            f'sum by (objective) (increase({EVENTS}{{verdict="{verdict}"}}[{window}]))'
            for verdict in ("good", "bad")
        )
        overdue = f"(sum by (objective) ({OVERDUE}) or 0 * {bad})"
        both = f"{_name('good', window)} + {_name('bad', window)}"
        rules += [
            {"record": _name("good", window), "expr": good},
            {"record": _name("bad", window), "expr": f"{bad}\n+ {overdue}"},
            {"record": _name("counted", window), "expr": both},
        ]
    return rules


def _alerts(objectives: Sequence[Objective], min_bad: int) -> list[dict[str, Any]]:
    alerts = []
    for objective in objectives:
        for severity in SEVERITIES:
            rules = [rule for rule in RULES if rule.severity == severity]
            alerts.append(
                {
                    "alert": _ALERTS[severity],
                    "expr": "\nor\n".join(_burns(rule, objective, min_bad) for rule in rules),
                    "labels": {
                        "severity": severity,
                        "objective": objective.name.replace("{{", '{{"{{"}}'),
                    },
                    "annotations": {
                        "summary": "{{ $labels.objective }}: the error budget burns too fast",
                        "description": (
                            '{{ $value | printf "%.0f" }} bad requests: more than '
                            f"{_windows(rules)}. /slo says how it stands."
                        ),
                    },
                }
            )
    return alerts


def _burns(rule: BurnRule, objective: Objective, min_bad: int) -> str:
    """That one rule holds; its value is the number of bad requests in the long window."""
    share = f"{(rule.factor * objective.budget).normalize():f}"
    long, short = WINDOW_NAMES[rule.long_s], WINDOW_NAMES[rule.short_s]
    quoted = objective.name.replace("\\", r"\\").replace('"', r"\"")
    label = f'{{objective="{quoted}"}}'
    bad_long, bad_short = _name("bad", long) + label, _name("bad", short) + label
    return (
        f"{bad_long} >= {min_bad}\n"
        f"and {bad_long} >= {share} * {_name('counted', long)}{label}\n"
        f"and {bad_short} > 0\n"
        f"and {bad_short} >= {share} * {_name('counted', short)}{label}"
    )


def _name(kind: str, window: str) -> str:
    return f"objective:jaxserve_slo_{kind}:increase{window}"


def _windows(rules: Sequence[BurnRule]) -> str:
    return " or ".join(
        f"{rule.factor}x over {WINDOW_NAMES[rule.long_s]} and {WINDOW_NAMES[rule.short_s]}"
        for rule in rules
    )


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay so."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
