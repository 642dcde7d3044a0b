"""A real Prometheus over a real server: dashboards, rules, and counters through the engine's death.

The server has two HTTP workers, a key file, adapters, and a fake engine behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.http.test_adapters import written
from tests.http.test_serve import TIMEOUT_S, address_of, children, command, started

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "jaxserve.json").read_text())
VLLM = json.loads((ROOT / "tests" / "data" / "prometheus" / "vllm_dashboards.json").read_text())
#: Panels over what this server does not do: nobody drafts tokens.
EMPTY = {"Drafts"}
SETTINGS = (
    *("http.workers=2", "model.max_context=1024", "lora.enabled=true", "lora.classes=4x3"),
    *("cache.host_bytes=65536", "engine.restart_backoff_s=0.05"),
    *("telemetry.device_flops_per_s=1e12", "telemetry.device_bytes_per_s=1e11"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="needs prometheus and promtool",
    ),
]


class Prometheus:
    """A running one.

    Args:
        client: of its address.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def ask(self, path: str, **params: str) -> dict:
        """The data of an answer, which must be one."""
        document = self._client.get(f"/api/v1/{path}", params=params).json()
        assert document["status"] == "success", (params, document)
        return document["data"]

    def values(self, query: str) -> list[float]:
        """What a query gives now, by series."""
        return [float(one["value"][1]) for one in self.ask("query", query=query)["result"]]

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


def until(condition, what: str) -> None:
    """Waits for something, for a minute."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


@contextmanager
def prometheus(directory: Path, target: str, key: str) -> Iterator[Prometheus]:
    """Scrapes a server each second, with the deployment's own configuration."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [target]}]
    scrape["authorization"] = {"credentials": key}
    path = directory / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={path}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
            running = Prometheus(client)
            until(running.ready, "Prometheus has not started")
            yield running
    finally:
        process.terminate()
        process.communicate()


def key_file(directory: Path) -> Path:
    """Two tenants, one of them an admin's."""
    rows = [
        {"hash": hashlib.sha256(name.encode()).hexdigest(), "tenant": name, "role": role}
        for name, role in (("ops", "admin"), ("acme", "user"))
    ]
    path = directory / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": rows}))
    return path


def substituted(query: str) -> str:
    """A dashboard's query as Grafana would send it."""
    for variable, value in (
        *(("$__rate_interval", "10s"), ("$__interval", "10s"), ("$__range", "10s")),
        *(("$job", "jaxserve"), ("$instance", ".*")),
    ):
        query = query.replace(variable, value)
    return query


def vllm_queries(model: str) -> dict[str, str]:
    """Of each series that vLLM's dashboards name, a query as theirs."""
    queries = {}
    for names in VLLM["dashboards"].values():
        for name in names:
            series = f'{name}{{model_name="{model}"}}'
            if name.endswith("_bucket"):
                queries[name] = f"histogram_quantile(0.9, sum by(le) (rate({series}[10s])))"
            elif name.endswith(("_total", "_sum", "_count")):
                queries[name] = f"sum(rate({series}[10s])) > 0"
            else:
                queries[name] = series
    return queries


def send(client: httpx.Client, number: int) -> None:
    """Some requests: of two tenants, with and without an adapter, and one that is refused."""
    for tenant, model in (("acme", None), ("acme", "live"), ("ops", None)):
        body = {
            "prompt": list(range(3, 40)),
            "seed": number,
            "max_tokens": 8,
            "n": 2,
            "ignore_eos": True,
        }
        if model is not None:
            body["model"] = model
        headers = {"authorization": f"Bearer {tenant}"}
        response = client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
    assert client.post("/v1/completions", json={}, headers=headers).status_code == 400


def fill(client: httpx.Client, prom: Prometheus, queries: dict[str, str]) -> None:
    """Sends requests until each query has given a number."""
    left = dict(queries)
    deadline_s = time.monotonic() + TIMEOUT_S
    number = 0
    while left:
        send(client, number)
        number += 1
        left = {
            name: query
            for name, query in left.items()
            if not any(map(math.isfinite, prom.values(query)))
        }
        assert time.monotonic() < deadline_s, f"no data: {left}"


def test_dashboards_rules_and_counters_of_a_server_whose_engine_dies(tmp_path: Path):
    written(tmp_path / "adapter", 1)
    with started(*SETTINGS, f"http.key_file={key_file(tmp_path)}") as process:
        base = address_of(process)
        with (
            httpx.Client(base_url=base, timeout=TIMEOUT_S) as client,
            prometheus(tmp_path, base.removeprefix("http://"), "ops") as prom,
        ):
            load = {"lora_name": "live", "lora_path": str(tmp_path / "adapter")}
            admin = {"authorization": "Bearer ops"}
            assert client.post("/v1/load_lora_adapter", json=load, headers=admin).is_success
            until(lambda: prom.values("up") == [1], "it cannot be scraped")
            model = client.get("/v1/models", headers=admin).json()["data"][0]["id"]
            fill(client, prom, _own_queries() | vllm_queries(model))
            for query in _queries_of(EMPTY) + [note["expr"] for note in _notes()]:
                prom.values(substituted(query))  # at least it is one

            engine = next(p for p in children(process.pid) if "fakes.engine" in command(p))
            os.kill(engine, signal.SIGKILL)
            until(lambda: prom.values("jaxserve_engine_restarts_total") == [1], "no restart")
            fill(client, prom, {"tokens": "rate(jaxserve_output_tokens_total[5s]) > 0"})
            _check_counters(prom)
            _check_page(client.get("/metrics", headers=admin).content)
            _check_rules(prom)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


def _own_queries() -> dict[str, str]:
    return {
        f"{panel['title']}: {target['expr']}": substituted(target["expr"])
        for panel in DASHBOARD["panels"]
        if panel["title"] not in EMPTY
        for target in panel.get("targets", ())
    }


def _queries_of(titles: set[str]) -> list[str]:
    found = [panel for panel in DASHBOARD["panels"] if panel["title"] in titles]
    assert len(found) == len(titles)
    return [target["expr"] for panel in found for target in panel["targets"]]


def _notes() -> list[dict]:
    return [note for note in DASHBOARD["annotations"]["list"] if "expr" in note]


def _check_counters(prom: Prometheus) -> None:
    """None fell when the engine began anew; and nothing is NaN."""
    names = prom.ask("label/__name__/values")
    counters = [
        name
        for name in names
        if name.startswith(("jaxserve_", "vllm:", "gen_ai_"))
        and name.endswith(("_total", "_count", "_sum", "_bucket"))
        and not name.startswith("jaxserve_observer_")  # its own process, its own life
    ]
    assert len(counters) > 100
    for name in counters:
        assert prom.values(f"sum(resets({name}[1m])) > 0") == [], name
    for name in names:
        assert not any(map(math.isnan, prom.values(name))), name


def _check_page(page: bytes) -> None:
    """promtool objects to nothing of it, the observer's part too, but to vLLM's own names."""
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    said = (done.stdout + done.stderr).decode().splitlines()
    assert b"jaxserve_observer_up 1.0" in page
    assert [line for line in said if not line.startswith("vllm:")] == []


def _check_rules(prom: Prometheus) -> None:
    """All can be evaluated, and of a server that only once restarted its engine none is raised."""
    until(
        lambda: all(
            rule["health"] == "ok"
            for group in prom.ask("rules")["groups"]
            for rule in group["rules"]
        ),
        "a rule cannot be evaluated",
    )
    rules = [rule for group in prom.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {
        rule["alert"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
    }
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
