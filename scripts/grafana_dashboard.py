"""Writes deploy/grafana/jaxserve.json from `grafana_panels`, or with --check compares.

The dashboard is for Grafana 10 and later, over any Prometheus that scrapes jaxserve's /metrics.
Every query is held against a real Prometheus and server by tests/http/metrics/test_prometheus.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout needs no installation

from scripts.grafana_panels import ROWS, Panel  # noqa: E402

DASHBOARD = ROOT / "deploy" / "grafana" / "jaxserve.json"

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: Put in place of $S in queries: which servers are looked at.
SELECTOR = 'job=~"$job",instance=~"$instance"'
WIDTH = 24


def dashboard() -> dict[str, Any]:
    """The whole document."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + panel.height
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            panels.append(_panel(len(panels) + 1, panel, place))
            x += panel.width
        y += row[-1].height
    return {
        "annotations": {"list": [_restarts()]},
        "description": "jaxserve: latency, traffic, memory, device, tenants",
        "editable": True,
        "graphTooltip": 1,
        "links": [],
        "panels": panels,
        "refresh": "10s",
        "schemaVersion": 39,
        "tags": ["jaxserve", "llm"],
        "templating": {"list": _variables()},
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "title": "jaxserve",
        "uid": "jaxserve",
        "version": 1,
    }


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    options: dict[str, Any]
    if panel.kind == "stat":
        colours = zip(("green", "yellow", "red"), (None, *panel.limits), strict=False)
        steps = [{"color": colour, "value": value} for colour, value in colours]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        calculated = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        options = {"reduceOptions": calculated, "colorMode": "value", "graphMode": "area"}
    else:
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 25 if panel.stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": stacking,
        }
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        options = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "gridPos": place,
        "options": options,
        "targets": [
            {
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": query.replace("$S", SELECTOR),
                "legendFormat": legend or "__auto",
                "range": True,
                "refId": chr(ord("A") + index),
            }
            for index, (legend, query) in enumerate(panel.queries)
        ],
    }


def _restarts() -> dict[str, Any]:
    """Marks where an engine was started again."""
    query = f"changes(jaxserve_engine_restarts_total{{{SELECTOR}}}[$__interval]) > 0"
    return {
        "name": "Engine restarts",
        "datasource": DATASOURCE,
        "enable": True,
        "expr": query,
        "iconColor": "red",
        "titleFormat": "The engine was started again",
    }


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource"}
    found = [source | {"query": "prometheus", "refresh": 1, "hide": 0}]
    for name, label, query in (
        ("job", "Job", "label_values(jaxserve_engine_ready, job)"),
        ("instance", "Server", 'label_values(jaxserve_engine_ready{job=~"$job"}, instance)'),
    ):
        found.append(
            {
                "name": name,
                "label": label,
                "type": "query",
                "datasource": DATASOURCE,
                "definition": query,
                "query": {"query": query, "refId": name},
                "refresh": 2,
                "includeAll": True,
                "allValue": ".*",
                "multi": True,
                "hide": 0,
                "sort": 1,
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return found


def main() -> int:
    """Writes it, or with --check says whether it is up to date."""
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
    if "--check" not in sys.argv[1:]:
        DASHBOARD.write_text(text, encoding="utf-8")
        return 0
    if DASHBOARD.read_text(encoding="utf-8") != text:
        print(f"{DASHBOARD} is out of date: run scripts/grafana_dashboard.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
