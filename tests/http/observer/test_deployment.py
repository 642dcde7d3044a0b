"""Deployments are noticed once, told to all parts, and remembered."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from pathlib import Path

import pytest

from jaxserve.config import Config, SchedulerConfig
from jaxserve.http.observer import deployment as deployment_module
from jaxserve.http.observer.deployment import make_deployment
from jaxserve.http.observer.messages import Question, Report
from jaxserve.http.observer.observer import Observer
from jaxserve.http.observer.parts import make_parts
from jaxserve.protocol.status import EngineStatus
from jaxserve.telemetry.baselines.identity import Deployment
from jaxserve.types import DeviceInfo, ModelInfo

MODEL = ModelInfo(name="m", max_context=8, vocab_size=8, eos_token_ids=(), cache_groups=())
OLD = Deployment(software={"jaxserve": "1"}, model="a", settings={"x.y": "1"})
NEW = Deployment(software={"jaxserve": "2"}, model="a", settings={"x.y": "2"})


def status(count: int = 1) -> EngineStatus:
    device = DeviceInfo(kind="chip", count=count)
    return EngineStatus(state="ready", pid=1, step_age_s=0.0, model=MODEL, device=device)


def lives(state: Path, mine: Deployment, *said: EngineStatus) -> list[tuple[str, str]]:
    """What a server tells whose engine says so, one after another."""
    told: list[tuple[str, str]] = []

    async def live() -> None:
        part = make_deployment(mine, state, lambda *news: told.append(news))
        for each in said:
            part.status(each)
            await part.tick()
        await part.close()

    asyncio.run(live())
    return told


def test_only_what_is_another_than_before_is_told(tmp_path: Path):
    loading = EngineStatus(state="loading", pid=1, step_age_s=0.0)
    assert lives(tmp_path, OLD, loading, status(), status()) == []  # the first ever
    assert lives(tmp_path, OLD, loading, status()) == []  # started again
    assert lives(tmp_path, NEW, loading, status(), status()) == [
        ("deployed", "jaxserve from 1 to 2"),
        ("configured", "x.y from 1 to 2"),
    ]
    assert lives(tmp_path, NEW, status()) == []
    assert [kind for kind, _ in lives(tmp_path, OLD, status())] == ["deployed", "configured"]


def test_an_engine_that_comes_back_on_other_devices_is_told_while_the_server_runs(tmp_path: Path):
    told = lives(tmp_path, OLD, status(4), status(4), status(3), status(3))
    assert told == [("deployed", "device from 4 x chip to 3 x chip")]


@pytest.mark.parametrize("content", ["{", '{"version": 1}', '{"version": 9}'])
def test_a_file_that_is_broken_is_set_aside(tmp_path: Path, content: str):
    (tmp_path / "deployment.json").write_text(content)
    assert lives(tmp_path, OLD, status()) == []
    assert (tmp_path / "deployment.broken").read_text() == content
    assert len(lives(tmp_path, NEW, status())) == 2


def test_a_disk_that_takes_nothing_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deployment_module.Document, "save", full)
    assert lives(tmp_path, OLD, status(), status()) == []
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [error.message for error in errors] == [
        "what is deployed cannot be kept: No space left on device"
    ]


def test_a_change_of_settings_reaches_baselines_and_console_by_the_observer(tmp_path: Path):
    def serve(config: Config) -> list[dict]:
        async def work() -> list[dict]:
            parts = make_parts(config, tmp_path, lambda *_: None, lambda *n: observer.news(*n))
            observer = Observer(tmp_path / "socket", parts, 1.0)
            observer._take(Report(worker=0, life="a", number=1, status=status()))
            answers = [
                await observer._ask(Question(id=0, name=name, admin=True))
                for name in ("baselines", "console")
            ]
            await observer.close()
            return [json.loads(answer.body) for answer in answers]

        return asyncio.run(work())

    config = Config()
    baselines, console = serve(config)
    assert baselines["changes"] == console["news"] == []
    slower = dataclasses.replace(config, scheduler=SchedulerConfig(max_rows=8))
    baselines, console = serve(slower)
    (change,) = baselines["changes"]
    assert (change["what"], change["reason"]) == ("marked", "scheduler.max_rows from 64 to 8")
    assert change["version"] == Deployment.of(slower).version
    assert [item["kind"] for item in console["news"]] == ["configured"]
