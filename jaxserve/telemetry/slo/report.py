"""How the objectives stand, as a document (/slo) and as a table for people (/slo?format=text)."""

from __future__ import annotations

from typing import Any

from jaxserve.telemetry.slo.book import COUNTED_REQUESTS, GOOD_REQUESTS, GOOD_TOKENS, Count, Tally
from jaxserve.telemetry.slo.burn import SEVERITIES, WINDOWS_S, burn_rate
from jaxserve.telemetry.slo.compliance import Compliance
from jaxserve.telemetry.slo.judge import APART, BAD
from jaxserve.telemetry.slo.objective import Objective

_GOODPUT_WINDOWS = {"5m": 300, "1h": 3600}
_COLUMNS = ("objective", "kept", "good", "bad", "budget left", "burn 5m", "1h", "6h", "3d", "alert")


def report(compliance: Compliance) -> dict[str, Any]:
    """The document; every number in it is finite, and null where there was nothing to count."""
    return {
        "objectives": [
            _objective(compliance, objective, tally)
            for objective, tally in compliance.by_objective()
        ],
        "goodput": {
            name: goodput(compliance, window_s) for name, window_s in _GOODPUT_WINDOWS.items()
        },
        "kept": {"file": str(compliance.file.path), "problem": compliance.file.problem or None},
        "uptime_s": round(compliance.uptime_s, 1),
        "running": len(compliance.book.running),
    }


def goodput(compliance: Compliance, window_s: int) -> dict[str, float | None]:
    """What met all its objectives, a second, over a window or since the start."""
    row = compliance.book.goodput.total(window_s)
    seconds = max(1.0, min(window_s, compliance.uptime_s))
    return {
        "requests_per_s": row[GOOD_REQUESTS] / seconds,
        "tokens_per_s": row[GOOD_TOKENS] / seconds,
        "counted_requests_per_s": row[COUNTED_REQUESTS] / seconds,
        "share": row[GOOD_REQUESTS] / row[COUNTED_REQUESTS] if row[COUNTED_REQUESTS] else None,
    }


def compliance_share(count: Count) -> float | None:
    """Share of good requests; None where there were none."""
    return count.good / count.total if count.total else None


def budget_left(objective: Objective, count: Count) -> float:
    """Share of the error budget that is left; negative where it is overdrawn."""
    return 1 - burn_rate(objective, count)


def _objective(compliance: Compliance, objective: Objective, tally: Tally) -> dict[str, Any]:
    count = tally.count(objective.period_s)
    verdicts = tally.verdicts(objective.period_s)
    share = compliance_share(count)
    allowed = float(objective.budget * count.total)
    scope = objective.indicator.scope
    return {
        "name": objective.name,
        "kind": str(objective.indicator.kind),
        "threshold_ms": objective.indicator.threshold_ns / 1e6 or None,
        "target_percent": float(objective.target * 100),
        "scope": {
            "model": list(scope.model),
            "tenant": list(scope.tenant),
            "priority": scope.priority or None,
            "adapter": list(scope.adapter),
        },
        "period_s": objective.period_s,
        "compliance_percent": None if share is None else 100 * share,
        "met": None if share is None else count.bad <= objective.budget * count.total,
        "good": count.good,
        "bad": count.bad,
        "bad_by_cause": {v.name.lower(): verdicts[v] for v in BAD} | {"overdue": tally.overdue},
        "not_counted": {verdict.name.lower(): verdicts[verdict] for verdict in APART},
        "budget": {
            "allowed_bad": allowed,
            "left_bad": float(objective.budget * count.total - count.bad),
            "left_share": budget_left(objective, count),
        },
        "burn_rates": {
            name: burn_rate(objective, tally.count(window_s))
            for name, window_s in WINDOWS_S.items()
        },
        "alerts": {
            severity: compliance.alerts.is_firing(objective, severity) for severity in SEVERITIES
        },
    }


def report_text(document: dict[str, Any]) -> str:
    """The same for a terminal."""
    rows = [list(_COLUMNS), *(_text_row(objective) for objective in document["objectives"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    for name, of_window in document["goodput"].items():
        share = of_window["share"]
        lines.append(
            f"goodput over {name}: {of_window['requests_per_s']:.2f} of "
            f"{of_window['counted_requests_per_s']:.2f} requests/s "
            f"({'no traffic' if share is None else f'{100 * share:.2f}%'}), "
            f"{of_window['tokens_per_s']:.1f} tokens/s"
        )
    if document["kept"]["problem"]:
        lines.append(f"! {document['kept']['problem']}")
    return "\n".join(lines) + "\n"


def _text_row(objective: dict[str, Any]) -> list[str]:
    percent = objective["compliance_percent"]
    firing = [severity for severity, is_on in objective["alerts"].items() if is_on]
    return [
        objective["name"],
        "–" if percent is None else f"{percent:.3f}%",
        str(objective["good"]),
        str(objective["bad"]),
        f"{100 * objective['budget']['left_share']:.1f}%",
        *(f"{objective['burn_rates'][window]:.2f}" for window in ("5m", "1h", "6h", "3d")),
        ", ".join(firing) or "–",
    ]
