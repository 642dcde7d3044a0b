"""The engine process of a host that follows host 0: how it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from jaxserve.config import Config
from jaxserve.device.hosts import EXIT_LOST
from jaxserve.engine.parts import Factory
from jaxserve.engine.process import EXIT_FAILED, EXIT_STEP_FAILED, follow
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import ConfigError, HostLost, WeightsError
from jaxserve.protocol.thread import ThreadRoad
from jaxserve.settings import load_config
from tests.fakes.engine import fake_parts

CONFIG = load_config(
    settings=["parallel.hosts=2", "parallel.host=1", "parallel.coordinator=a:1"], environ={}
)


class Notes:
    """Hosts that note what is asked of them."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def await_loss(self) -> None:
        self.asked.append("await_loss")

    def close(self, reason: str) -> None:
        self.asked.append(reason)


def factory(follower: Callable[[], None], notes: Any = None) -> Factory:
    """Parts whose device calls are these."""

    def load(config: Config, progress: Any) -> Any:
        return dataclasses.replace(fake_parts(config, progress), follow=follower, hosts=notes)

    return load


def failing(error: Exception) -> Any:
    """Raises this, whatever it is called with."""

    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (HostLost("host 0 was not met"), EXIT_LOST, "jaxserve: host 0 was not met\n"),
        (WeightsError("no such file"), EXIT_FAILED, "jaxserve: no such file\n"),
        (OSError("disk"), EXIT_FAILED, "jaxserve: OSError: disk\n"),
    ],
)
def test_a_start_that_fails_is_one_sentence(
    error: Exception, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(CONFIG, ThreadRoad().server, failing(error)) == status
    assert capsys.readouterr().err == sentence


def test_it_follows_once_it_is_loaded() -> None:
    made: list[str] = []
    assert follow(CONFIG, ThreadRoad().server, factory(lambda: made.append("calls"))) == 0
    assert made == ["calls"]


def test_after_a_failed_step_a_loss_is_looked_for_before_the_others_are_told() -> None:
    notes = Notes()
    assert (
        follow(CONFIG, ThreadRoad().server, factory(failing(RuntimeError("gloo")), notes))
        == EXIT_STEP_FAILED
    )
    assert notes.asked == ["await_loss", "a step failed"]


def test_an_engine_in_a_thread_is_no_host_of_several() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.hosts=2: an engine in a thread runs on one"):
        EngineThread(CONFIG, fake_parts)
