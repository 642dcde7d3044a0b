"""What is in deploy/: the dashboard, the rules, and that they name what there is."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxserve.config import TelemetryConfig
from jaxserve.http.metrics import Metrics
from jaxserve.http.metrics.families import FAMILIES
from jaxserve.protocol.status import EngineStatus
from jaxserve.types import DeviceInfo, ModelInfo
from tests.http.metrics.exposed import Exposed

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "deploy" / "grafana" / "jaxserve.json"
RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
RULE_TESTS = ROOT / "tests" / "data" / "prometheus" / "alerts_test.yaml"
PAGE = ROOT / "docs" / "metrics.md"
#: Of the observer and of Prometheus itself.
FOREIGN = {
    *("jaxserve_observer_requests_total", "jaxserve_observer_dropped_total"),
    *("jaxserve_observer_faults_total", "jaxserve_observer_up", "jaxserve_observer_state_kept"),
}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (prometheus)"
)


def names() -> set[str]:
    """Of all families, vLLM's too, as their samples begin."""
    model = ModelInfo(name="m", max_context=9, vocab_size=8, eos_token_ids=(1,), cache_groups=())
    device = DeviceInfo(kind="x", count=1, flops_per_s=1, bytes_per_s=1)
    status = EngineStatus(
        state="ready", pid=1, step_age_s=0, model=model, device=device, adapter_slots=1
    )
    seen = Exposed(Metrics(lambda: status, config=TelemetryConfig()).render())
    shown = {f"{name}_total" if kind == "counter" else name for name, kind in seen.kinds.items()}
    return shown | {family.name for family in FAMILIES.values() if not family.hidden} | FOREIGN


def used(text: str) -> set[str]:
    """Families that queries name."""
    found = set(re.findall(r"\b(?:jaxserve|gen_ai)_[a-z0-9_]+", text))
    labels = {label for family in FAMILIES.values() for label in family.labels}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found - labels}


def test_the_dashboard_is_what_the_script_writes():
    script = runpy.run_path(str(ROOT / "scripts" / "grafana_dashboard.py"))
    assert json.loads(DASHBOARD.read_text()) == json.loads(json.dumps(script["dashboard"]()))


def test_the_dashboard_has_grafanas_shape():
    board = json.loads(DASHBOARD.read_text())
    assert board["title"] and board["uid"] and board["schemaVersion"] >= 36
    variables = {variable["name"] for variable in board["templating"]["list"]}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 40
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert not cells & taken, panel["title"]  # none over another
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"] and panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            asked = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert asked <= variables, target["expr"]
            assert target["datasource"]["uid"] == "${datasource}"


def test_dashboard_and_rules_name_only_what_there_is():
    board = json.loads(DASHBOARD.read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", ())]
    asked = used(" ".join(target["expr"] for target in targets))
    rules = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    asked_by_rules = used(" ".join(rule["expr"] for rule in rules))
    assert len(asked) > 40 and len(asked_by_rules) > 15
    assert asked | asked_by_rules <= names()


def test_every_rule_says_what_and_how_bad():
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_every_rule_is_tried_both_ways():
    rules = {
        rule["alert"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
    }
    raised, silent = set(), set()
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (raised if case["exp_alerts"] else silent).add(case["alertname"])
    assert raised == silent == rules


@needs_promtool
@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", RULES),
        ("check", "config", RULES.parent / "prometheus.yaml"),
        ("test", "rules", RULE_TESTS),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_promtool_finds_the_rules_right(words):
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_lists_every_metric():
    page = PAGE.read_text()
    labels = {label for family in FAMILIES.values() for label in family.labels}
    listed = set(re.findall(r"`((?:jaxserve_|gen_ai_|vllm:)[a-z0-9_]+)`", page)) - labels
    assert names() <= listed, sorted(names() - listed)
    assert listed <= names(), sorted(listed - names())
