"""The generated Prometheus rules: they parse, and say what the alerts in process say."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jaxserve.cli import main
from jaxserve.config import SloConfig
from jaxserve.protocol.records import Outcome
from jaxserve.telemetry.slo.burn import SEVERITIES, alert_key
from jaxserve.telemetry.slo.metrics import EVENTS, OVERDUE, families
from jaxserve.telemetry.slo.rules import make_rules
from tests.telemetry.slo.simulation import Server

pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")

DONE, FAILED = Outcome.DONE, Outcome.FAILED
ALERTS = {"page": "JaxserveErrorBudgetBurnsFast", "ticket": "JaxserveErrorBudgetBurns"}
#: Outcomes of the requests that end in a second of the trace; "hang" begins some that do not end.
Traffic = Callable[[int, random.Random], list[Outcome | str]]


def promtool(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


class Scrape:
    """Series as Prometheus would have them, and when each alert was on in process.

    Args:
        traffic: what ends in each step of `step_s`.
        resets_at: seconds at which its counters begin again at 0.
    """

    def __init__(
        self,
        server: Server,
        seconds: int,
        interval_s: int,
        traffic: Traffic,
        resets_at: tuple[int, ...] = (),
        step_s: int = 1,
    ) -> None:
        self.interval_s = interval_s
        self.seconds = seconds
        self.values: dict[str, list[float]] = {}
        self.firing: list[set[str]] = []  # after each second
        rng = random.Random(3)
        base: dict[str, float] = {}
        now: dict[str, float] = {}
        hanging = []
        for second in range(0, seconds + 1, step_s):
            if second in resets_at:
                base = {name: value for name, value in now.items() if EVENTS in name}
            if second % interval_s == 0:
                now = self._sample(server, base)
            self.firing += [set(server.compliance.alerts.firing)] * step_s
            for outcome in traffic(second, rng):
                if outcome == "hang":
                    hanging.append(server.begin())
                elif outcome == "wake":
                    while hanging:
                        server.end(hanging.pop())
                else:
                    server.end(outcome=outcome)
            server.clocks.advance(step_s)
            server.compliance.tick()

    def _sample(self, server: Server, base: dict[str, float]) -> dict[str, float]:
        now = {}
        for family in families(server.compliance):
            for sample in family.samples:
                if sample.name not in (EVENTS, OVERDUE):
                    continue
                labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
                name = f"{sample.name}{{{labels}}}"
                now[name] = sample.value
                self.values.setdefault(name, []).append(sample.value - base.get(name, 0))
        return now

    def is_settled(self, second: int, key: str) -> bool:
        """Whether the alert has been the same for a scrape and an evaluation, and stays so."""
        span = range(second - 2 * self.interval_s, min(second + self.interval_s, self.seconds) + 1)
        return len({key in self.firing[at] for at in span if at >= 0}) == 1


def check(scrape: Scrape, server: Server, directory: Path, every_s: int) -> int:
    """Has promtool evaluate the rules over the series at many moments.

    Returns how many moments were compared.
    """
    config = SloConfig(
        objectives=server.objectives,
        min_bad_events=server.compliance.alerts.min_bad,
    )
    (directory / "rules.yaml").write_text(make_rules(config))
    tests = []
    for second in range(every_s, scrape.seconds, every_s):
        for severity in SEVERITIES:
            expected, unsettled = [], False
            for objective in server.compliance.objectives:
                key = alert_key(objective, severity)
                unsettled = unsettled or not scrape.is_settled(second, key)
                if key in scrape.firing[second]:
                    expected.append(objective.name)
            if not unsettled:
                tests.append((second, severity, expected))
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": f"{scrape.interval_s}s",
        "tests": [
            {
                "interval": f"{scrape.interval_s}s",
                "input_series": [
                    {"series": name, "values": " ".join(f"{value:g}" for value in values)}
                    for name, values in scrape.values.items()
                ],
                "promql_expr_test": [
                    {
                        "eval_time": f"{second}s",
                        "expr": f'count by (objective) (ALERTS{{alertname="{ALERTS[severity]}"}})',
                        "exp_samples": [
                            {"labels": f'{{objective="{name}"}}', "value": 1} for name in expected
                        ],
                    }
                    for second, severity, expected in tests
                ],
            }
        ],
    }
    (directory / "test.yaml").write_text(yaml.safe_dump(document))
    promtool("test", "rules", "test.yaml", cwd=directory)
    return len(tests)


def flips(scrape: Scrape, key: str) -> int:
    """How often an alert began or ended in process."""
    states = [key in firing for firing in scrape.firing]
    return sum(a != b for a, b in itertools.pairwise(states))


def storm(second: int, rng: random.Random) -> list[Outcome | str]:
    """Eight hours with an outage of 4 minutes, a hang, a slow burn, and a pause."""
    if second < 7200:
        share = 0.0
    elif second < 7440:
        share = 1.0
    elif second < 14_400:
        share = 0.0002
    elif second < 14_700:
        return ["hang", "hang"]
    elif second == 14_700:
        return ["wake"]
    elif second < 19_000:
        return [] if second < 16_000 else [DONE, DONE]
    else:
        share = 0.012
    return [FAILED if rng.random() < share else DONE for _ in range(2)]


@pytest.mark.slow
def test_the_rules_agree_with_the_alerts_in_process_on_a_replayed_trace(tmp_path: Path):
    server = Server(tmp_path, "availability > 99.9%", "error_rate < 0.5%")
    scrape = Scrape(server, 8 * 3600, 15, storm)
    page = "slo page: availability > 99.9%"
    assert flips(scrape, page) >= 4  # there is something to agree on
    assert flips(scrape, "slo ticket: error_rate < 0.5%") >= 1
    assert check(scrape, server, tmp_path, every_s=60) > 800


def test_the_rules_agree_through_counter_resets(tmp_path: Path):
    server = Server(tmp_path, "availability > 99.9%")

    def traffic(second: int, rng: random.Random) -> list[Outcome | str]:
        return [FAILED if 4000 < second < 4200 else DONE] * 3

    scrape = Scrape(server, 7200, 15, traffic, resets_at=(3600, 4110, 5000))
    assert flips(scrape, "slo page: availability > 99.9%") >= 1
    assert check(scrape, server, tmp_path, every_s=60) > 100


@pytest.mark.slow
def test_the_slow_rule_agrees_over_days(tmp_path: Path):
    server = Server(tmp_path, "error_rate < 1%")

    def traffic(second: int, rng: random.Random) -> list[Outcome | str]:
        if second % 60:
            return []
        bad = 86_400 < second < 180_000
        return [FAILED if bad and rng.random() < 0.03 else DONE for _ in range(5)]

    scrape = Scrape(server, 3 * 86_400, 120, traffic, step_s=60)
    assert flips(scrape, "slo ticket: error_rate < 1%") >= 2
    assert check(scrape, server, tmp_path, every_s=2400) > 150


def test_one_error_in_20_requests_pages_nobody_by_the_rules(tmp_path: Path):
    server = Server(tmp_path, "availability > 99.9%")

    def traffic(second: int, rng: random.Random) -> list[Outcome | str]:
        return [] if second % 180 else [FAILED if second == 1260 else DONE]

    scrape = Scrape(server, 3600, 15, traffic)
    assert not any(scrape.firing)
    assert check(scrape, server, tmp_path, every_s=30) == 2 * 119


def test_no_traffic_no_series_and_nan_raise_nothing(tmp_path: Path):
    config = SloConfig(objectives=("availability > 99.9%", "p99 ttft < 100 ms"))
    (tmp_path / "rules.yaml").write_text(make_rules(config))
    flat, gone = (
        f'{EVENTS}{{objective="availability > 99.9%",verdict="good",instance="{instance}"}}'
        for instance in ("flat", "gone")
    )
    labels = {"objective": "p99 ttft < 100 ms", "verdict": "bad"}
    nan = {"record": EVENTS, "labels": labels, "expr": "vector(0) / 0"}
    group = {"groups": [{"name": "nan", "rules": [nan]}]}
    (tmp_path / "nan.yaml").write_text(yaml.safe_dump(group))
    document = {
        "rule_files": ["rules.yaml", "nan.yaml"],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": flat, "values": "0x480"},
                    {"series": gone, "values": "0+10x100 stale"},
                ],
                "promql_expr_test": [
                    {"eval_time": f"{minute}m", "expr": "ALERTS", "exp_samples": []}
                    for minute in range(1, 120)
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    promtool("test", "rules", "test.yaml", cwd=tmp_path)


def test_a_server_that_is_gone_in_an_outage_still_pages(tmp_path: Path):
    """Without its gauge the counters alone decide."""
    config = SloConfig(objectives=("availability > 99.9%",))
    (tmp_path / "rules.yaml").write_text(make_rules(config))
    good, bad = (
        f'{EVENTS}{{objective="availability > 99.9%",verdict="{verdict}"}}'
        for verdict in ("good", "bad")
    )
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": good, "values": "0+30x240 7200x4 stale"},
                    {"series": bad, "values": "0x240 0+200x4 stale"},
                    {
                        "series": f'{OVERDUE}{{objective="availability > 99.9%"}}',
                        "values": "0x244 stale",
                    },
                ],
                "promql_expr_test": [
                    {
                        "eval_time": f"{second}s",
                        "expr": 'count(ALERTS{severity="page"})',
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    }
                    for second in (3690, 3720, 3780)
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    promtool("test", "rules", "test.yaml", cwd=tmp_path)


def test_the_command_prints_rules_that_promtool_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "server.yaml"
    objectives = ["p99 ttft < 100 ms", 'error_rate < 0.1% tenant=a"b\\c|{{x}}']
    file.write_text(yaml.safe_dump({"slo": {"objectives": objectives}}))
    assert main(["slo", "rules", "--config", str(file)]) == 0
    text = capsys.readouterr().out
    (tmp_path / "rules.yaml").write_text(text)
    assert "SUCCESS: 19 rules found" in promtool("check", "rules", "rules.yaml", cwd=tmp_path)
    shares = [
        line.split(" >= ")[1].split(" *")[0] for line in text.splitlines() if " * obj" in line
    ]
    assert shares == [
        *("0.144", "0.144", "0.06", "0.06", "0.01", "0.01"),
        *("0.0144", "0.0144", "0.006", "0.006", "0.001", "0.001"),
    ]
    labels = [rule["labels"] for rule in yaml.safe_load(text)["groups"][0]["rules"][15:]]
    assert labels[2]["objective"] == 'error_rate < 0.1% tenant=a"b\\c|{{"{{"}}x}}'


def test_without_objectives_the_command_says_so(capsys: pytest.CaptureFixture[str]):
    assert main(["slo", "rules"]) == 2
    assert "slo.objectives is empty" in capsys.readouterr().err
