"""The parts of alerts and baselines, in the observer and behind its routes."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.config import AlertsConfig, Config, ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.http.observer import alerts as alerts_module
from jaxserve.http.observer.alerts import (
    FAULT_S,
    SAVE_S,
    Alerts,
    alert_degraded,
    make_alerts,
    make_baselines,
)
from jaxserve.http.observer.messages import News, Question
from jaxserve.http.observer.observer import METRICS, Observer
from jaxserve.http.observer.part import Part
from jaxserve.http.observer.parts import check_parts, make_parts
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.telemetry.alerts.incident import Severity
from jaxserve.telemetry.baselines.identity import Deployment
from jaxserve.types import DeviceInfo, ModelInfo
from tests.fakes.alert_receiver import AlertReceiver
from tests.fakes.clock import Clock

SECRET = "sEcReT12345"
HERE = Deployment(software={}, model="0", settings={})


def config(at: AlertReceiver | None = None, **settings) -> Config:
    urls = (f"{at.url}/{SECRET}",) if at is not None else ()
    alerts = AlertsConfig(**{"webhooks": urls, "source": "here", "hold_s": 0.0} | settings)
    return Config(alerts=alerts, model=ModelConfig(served_name="m"))


def news(kind: str, at_s: float, subject: str = "") -> News:
    return News(kind=kind, at_ns=round(at_s * 1e9), subject=subject)


def status(state: str) -> EngineStatus:
    return EngineStatus(state=state, pid=1, step_age_s=0.0)


def serving() -> EngineStatus:
    model = ModelInfo(name="m", max_context=8, vocab_size=8, eos_token_ids=(), cache_groups=())
    return replace(status("ready"), model=model, device=DeviceInfo(kind="x"))


def step(at_s: float, device_ms: float) -> StepStats:
    zeros = dict.fromkeys(
        (
            *("step_id", "idle_ns", "draft_tokens", "draft_accepted_tokens", "flops", "waiting"),
            *("pages_used", "pages_total", "preemptions", "pages_cached", "prefill_tokens"),
            *("prefix_lookup_tokens", "prefix_hit_tokens", "compiles_after_warmup"),
        ),
        0,
    )
    same = dict.fromkeys(("rows", "tokens", "padded_tokens", "decode_tokens", "running"), 8)
    return StepStats(
        **zeros | same,
        program="decode_r8",
        bytes=1_000_000,
        device_ns=round(device_ms * 1e6),
        at_ns=round(at_s * 1e9),
    )


async def ask(part: Part, name: str) -> dict:
    return json.loads((await part.asks[name](Question(id=0, name=name, admin=True))).body)


def opened(alerts: Alerts) -> list[str]:
    return [incident.title for incident in alerts.notifier.book.open]


def test_an_engine_that_ends_again_and_again_is_one_incident_and_over_by_itself(tmp_path: Path):
    async def work() -> None:
        clock = Clock()
        alerts = make_alerts(config(), tmp_path, monotonic=clock)
        for _ in range(5):
            alerts.part.news(news("engine_down", clock.now_s))
            alerts.part.news(news("engine_started", clock.now_s))
            alerts.part.status(status("ready"))
            await alerts.part.tick()
            clock.advance(20)
        assert opened(alerts) == ["The engine ends and is started again and again"]
        alerts.part.news(news("engine_failed", clock.now_s, "out of restarts"))
        await alerts.part.tick()
        assert opened(alerts) == ["The engine has failed"]
        alerts.part.status(status("ready"))
        clock.advance(601)
        await alerts.part.tick()
        assert opened(alerts) == []
        assert len(alerts.notifier.book.recent) == 1
        await alerts.part.close()

    asyncio.run(work())


def test_an_observer_that_dies_again_and_again_is_told_by_its_next_life(tmp_path: Path):
    async def work() -> None:
        wall = Clock(1e9)
        for _ in range(3):  # and none of them is closed
            await make_alerts(config(), tmp_path, wall=wall).part.tick()
            wall.advance(5)
        alerts = make_alerts(config(), tmp_path, wall=wall)
        await alerts.part.tick()
        assert opened(alerts) == ["The observer dies and is started again and again"]
        wall.advance(601)
        await alerts.part.tick()
        await alerts.part.tick()
        assert opened(alerts) == []
        await alerts.part.close()

    asyncio.run(work())


def test_a_part_that_fails_is_an_incident_and_over_by_itself(tmp_path: Path):
    async def work() -> None:
        clock = Clock()
        alerts = make_alerts(config(), tmp_path, monotonic=clock)

        async def fail() -> None:
            raise OSError("the disk is full")

        ledger = Part(name="ledger", flush=fail)
        observer = Observer(tmp_path / "socket", [alerts.part, ledger], flush_interval_s=1.0)
        await observer._flush()
        await alerts.part.tick()
        assert opened(alerts) == ["The observer's part ledger fails"]
        clock.advance(FAULT_S + 1)
        await alerts.part.tick()
        assert opened(alerts) == []
        await alerts.part.close()

    asyncio.run(work())


def test_a_fault_of_the_alerts_themselves_ends_nothing(tmp_path: Path):
    async def work() -> None:
        def fail(_: News) -> None:
            raise RuntimeError("also of news")

        async def fail_too() -> None:
            raise RuntimeError("of the tick")

        parts = [Part(name="a", news=fail, flush=fail_too), Part(name="b", news=fail)]
        observer = Observer(tmp_path / "socket", parts, flush_interval_s=1.0)
        await observer._flush()
        assert observer._num_faults["a"] >= 2 and observer._num_faults["b"] >= 1

    asyncio.run(work())


def test_a_slower_engine_is_one_incident_from_steps_to_the_receiver(tmp_path: Path):
    async def work() -> None:
        clock = Clock()
        with AlertReceiver() as at:
            settings = config(at, baseline_samples=60)
            alerts = make_alerts(settings, tmp_path, monotonic=clock)
            part = make_baselines(settings, HERE, tmp_path, alerts.on_alert, monotonic=clock)
            part.status(serving())

            async def run(samples: int, device_ms: float) -> None:
                for number in range(samples):
                    for _ in range(10):
                        clock.advance(1.01)
                        part.step(step(clock.now_s, device_ms * (1 + 0.02 * (number % 3 - 1))))
                    await part.tick()
                    await alerts.part.tick()

            async def told(number: int) -> None:
                async with asyncio.timeout(10):
                    while len(at.bodies) < number:
                        await alerts.part.tick()
                        await asyncio.sleep(0.005)

            await run(80, 10.0)
            assert at.bodies == []
            await run(10, 10.6)
            await told(1)
            document = await ask(alerts.part, "alerts")
            assert [incident["key"] for incident in document["open"]] == ["degradation:m"]
            assert document["receivers"][0]["name"] == "webhook 1"
            assert SECRET not in json.dumps(document)
            series = (await ask(part, "baselines"))["series"]
            assert {s["metric"] for s in series if s["degraded"]} == {
                *("step_time", "mbu", "throughput")
            }
            await run(20, 10.0)
            await told(2)
            await run(20, 10.0)
            await alerts.part.close()
            await part.close()
            first, second = at.bodies
        assert first["key"] == second["key"] == "jaxserve/here/degradation:m"
        assert (first["status"], second["status"]) == ("firing", "resolved")
        assert first["severity"] == "warning"
        assert "is worse than its baseline" in first["title"]
        assert any("step_time" in name for name in first["details"])
        again = make_baselines(settings, HERE, tmp_path, alerts.on_alert, monotonic=clock)
        again.status(serving())
        series = (await ask(again, "baselines"))["series"]
        assert {s["samples"] for s in series} == {60}

    asyncio.run(work())


def test_a_grave_degradation_is_an_error():
    class Worse:
        def __init__(self, shift: float) -> None:
            from jaxserve.telemetry.baselines.detector import Detector
            from jaxserve.telemetry.baselines.series import Series, SeriesKey

            key = SeriesKey(metric="tpot", model="m", version="v", device="d", band="rows 8")
            detector = Detector(higher_is_worse=True)
            detector.shift = shift
            self.series = [Series(key, detector, 10.0, None)]

        def degraded(self):
            return self.series

        def models(self):
            return {"m"}

    said = []
    for shift in (0.1, 0.3):
        alert_degraded(Worse(shift), lambda *arguments: said.append(arguments))
    assert [arguments[2] for arguments in said] == [Severity.WARNING, Severity.ERROR]
    assert said[0][3] == "m is worse than its baseline: tpot +10.0%"


def test_deployments_are_told_by_news(tmp_path: Path):
    async def work() -> None:
        alerts = make_alerts(config(), tmp_path)
        part = make_baselines(config(), HERE, tmp_path, alerts.on_alert)
        part.news(news("engine_started", 1.0))
        part.news(news("deployed", 2.0, "version 7"))
        changes = (await ask(part, "baselines"))["changes"]
        assert [change["reason"] for change in changes] == ["version 7"]

    asyncio.run(work())


@pytest.mark.parametrize("content", ["{", '{"version": 1, "series": [{"key": {}}]}'])
def test_broken_baselines_are_set_aside(tmp_path: Path, content: str):
    (tmp_path / "baselines.json").write_text(content)
    make_baselines(config(), HERE, tmp_path, lambda *_: None)
    assert (tmp_path / "baselines.broken").read_text() == content


def test_a_disk_that_takes_nothing_costs_baselines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def work() -> None:
        clock = Clock()
        part = make_baselines(config(), HERE, tmp_path, lambda *_: None, monotonic=clock)

        def full(*_) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(alerts_module.Document, "save", full)
        for _ in range(3):
            clock.advance(SAVE_S)
            await part.tick()
        monkeypatch.undo()
        assert not (tmp_path / "baselines.json").exists()
        clock.advance(SAVE_S)
        await part.tick()
        assert (tmp_path / "baselines.json").exists()

    asyncio.run(work())
    assert caplog.text.count("baselines cannot be kept") == 1


def test_metrics_of_both(tmp_path: Path):
    async def work() -> str:
        with AlertReceiver() as at:
            parts = make_parts(config(at), tmp_path, lambda *_: None, lambda *_: None)
            observer = Observer(tmp_path / "s", parts, 1.0)
            alerts = next(part for part in parts if part.name == "alerts")
            alerts.news(news("engine_failed", 0.0, "x"))
            await alerts.tick()
            answer = await observer._ask(Question(id=0, name=METRICS))
            await observer.close()
            return answer.body.decode()

    text = asyncio.run(work())
    assert 'jaxserve_alerts_open{severity="critical"} 1.0' in text
    assert 'jaxserve_alert_queue{receiver="webhook 1"}' in text
    assert SECRET not in text


def test_degradation_can_be_left_out(tmp_path: Path):
    names = [part.name for part in make_parts(config(degradation=False), tmp_path, None, None)]
    assert "alerts" in names and "baselines" not in names


def test_a_wrong_receiver_ends_the_start_without_showing_it():
    with pytest.raises(ConfigError, match="entry 1 of alerts.slack") as caught:
        check_parts(config(slack=(f"htp://{SECRET}",)))
    assert SECRET not in caught.value.message


def test_no_secret_is_logged_whatever_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)

    async def work() -> None:
        with AlertReceiver() as at:
            at.statuses = [500, 400, 429]
            urls = (f"{at.url}/{SECRET}",)
            settings = config(at, slack=urls, alertmanagers=urls, webhook_secret=SECRET)
            alerts = make_alerts(settings, tmp_path)
            alerts.on_alert("k", True, Severity.CRITICAL, "t")
            for _ in range(30):
                await alerts.part.tick()
                await asyncio.sleep(0.005)
            await alerts.part.close()
            assert at.num_refused == 3

    asyncio.run(work())
    assert "did not take an alert" in caplog.text
    assert SECRET not in caplog.text
    assert SECRET not in (tmp_path / "alerts.json").read_text()
