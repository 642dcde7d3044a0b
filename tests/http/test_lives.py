"""The lives of the engine where starting another one fails."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import Config, EngineConfig
from jaxserve.http import lives as module
from jaxserve.http.lives import Lives
from jaxserve.http.news import News

FULL = OSError(errno.ENOSPC, "No space left on device")


async def _nothing() -> None:
    pass


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: Iterator[Any]) -> list[News]:
    """Lives whose first ends at once, and the next when it has begun; what workers are told."""
    told: list[News] = []
    engine = dataclasses.replace(EngineConfig(), max_restarts=3, restart_backoff_s=0.0)
    lives = Lives(
        dataclasses.replace(Config(), engine=engine),
        tmp_path / "flight",
        "nobody",
        tell=told.append,
        on_progress=lambda progress: None,
        on_ready=_nothing,
    )

    def start(*_: Any, **__: Any) -> Any:
        started = next(starts)
        if isinstance(started, Exception):
            raise started
        return started

    ends = iter([None, "it has ended"])

    async def live() -> str | None:
        return next(ends)

    monkeypatch.setattr(module.EngineProcess, "start", start)
    monkeypatch.setattr(lives, "_live", live)
    assert asyncio.run(lives.run()) == 1
    return told


class Engine:
    """One that runs."""

    address = "ipc://there"


def test_an_engine_that_cannot_be_started_is_tried_again(tmp_path, monkeypatch, capsys):
    told = run(tmp_path, monkeypatch, iter([FULL, FULL, Engine()]))
    assert told == [
        News(state="started", address="ipc://there"),
        News(state="failed", error="it has ended"),
    ]
    line = (
        "jaxserve: the engine process cannot be started: [Errno 28] No space left on device; it "
        "is started again"
    )
    assert capsys.readouterr().err.splitlines() == [line, line]


def test_within_the_budget_and_then_the_workers_are_told(tmp_path, monkeypatch, capsys):
    (news,) = run(tmp_path, monkeypatch, iter([FULL] * 9))
    assert news.state == "failed" and "No space left" in news.error
    assert news.error.endswith("engine.max_restarts=3")
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert not (tmp_path / "flight").exists()
