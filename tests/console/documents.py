"""What /slo, /v1/costs, /v1/usage and /v1/alerts answer, with a name in it that is markup."""

from __future__ import annotations

from typing import Any

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"

SLO: dict[str, Any] = {
    "objectives": [
        {
            "name": "p99 ttft < 500 ms",
            "target_percent": 99.0,
            "scope": {"model": [], "tenant": ["acme", HOSTILE], "priority": None, "adapter": []},
            "period_s": 2592000,
            "compliance_percent": 99.64,
            "good": 128403,
            "bad": 462,
            "budget": {"allowed_bad": 1288.6, "left_bad": 826.6, "left_share": 0.641},
            "burn_rates": {"5m": 0.2, "1h": 0.35, "6h": 0.5, "3d": 0.36},
            "alerts": {"page": False, "ticket": False},
        },
        {
            "name": "error_rate < 0.1%",
            "target_percent": 99.9,
            "scope": {},
            "period_s": 2592000,
            "compliance_percent": 98.2,
            "good": 982,
            "bad": 18,
            "budget": {"left_share": -17.0},
            "burn_rates": {"5m": 16.2},
            "alerts": {"page": True, "ticket": True},
        },
        {"name": HOSTILE, "compliance_percent": None, "good": 0, "bad": 0},
    ],
    "goodput": {"5m": {"requests_per_s": 4.8, "tokens_per_s": 231.5, "share": 0.983}},
}


def page_of(*results: dict[str, Any]) -> dict[str, Any]:
    """One bucket."""
    return {"object": "page", "data": [{"object": "bucket", "results": list(results)}]}


def _cost(tenant: str, value: float) -> dict[str, Any]:
    return {
        "amount": {"value": value, "currency": "usd"},
        "wasted": value / 10,
        "num_model_requests": 40,
        "tenant": tenant,
    }


def _tokens(tenant: str) -> dict[str, Any]:
    return {"input_tokens": 32000, "output_tokens": 7600, "energy_j": 998.0, "tenant": tenant}


COSTS = page_of(_cost(HOSTILE, 0.0042), _cost("acme", 12.5))
LINES = page_of(
    *(
        {"amount": {"value": value, "currency": "usd"}, "line_item": name}
        for name, value in {"hardware": 42.1, "idle": 22.5, "waste": 0.6, "busy": 21.5}.items()
    )
)
USAGE = page_of(_tokens("acme"))
ALERTS: dict[str, Any] = {
    "open": [
        {
            "key": "slo",
            "severity": "critical",
            "title": f"The budget of {HOSTILE} burns",
            "details": {HOSTILE: HOSTILE, "burn rate": "16.2"},
            "started_at": 1795699960.0,
            "ended_at": None,
        }
    ],
    "recent": [
        {
            "key": "slow",
            "severity": "warning",
            "title": "Step time is 7% above its baseline",
            "details": {},
            "started_at": 1795600000.0,
            "ended_at": 1795603600.0,
        }
    ],
    "receivers": [
        {"name": "slack 1", "queued": 2, "sent": 5, "failed": 1, "dropped": 0, "error": HOSTILE}
    ],
}


def answer_with_documents(page: Any) -> None:
    """Has these routes answer with the documents, whatever the server has."""
    for pattern, document in {
        "**/slo": SLO,
        "**/v1/alerts": ALERTS,
        "**/v1/costs?group_by=tenant*": COSTS,
        "**/v1/costs?group_by=line_item*": LINES,
        "**/v1/usage*": USAGE,
    }.items():

        def fulfill(route: Any, request: Any, document: Any = document) -> None:
            route.fulfill(json=document)

        page.route(pattern, fulfill)
