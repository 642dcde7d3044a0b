"""Where a server's records are kept, and what it does where they cannot be."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from jaxserve.config import Config, HttpConfig, TelemetryConfig
from jaxserve.errors import ConfigError
from jaxserve.telemetry import state as state_module
from jaxserve.telemetry.state import StateDirectory


def configured(path: Path) -> Config:
    return Config(telemetry=TelemetryConfig(state_dir=str(path)))


def test_one_server_at_a_time(tmp_path: Path):
    first = StateDirectory(configured(tmp_path / "state"), tmp_path)
    assert first.path == tmp_path / "state" and first.outlives
    with pytest.raises(ConfigError, match="another server"):
        StateDirectory(configured(tmp_path / "state"), tmp_path)
    first.release()
    StateDirectory(configured(tmp_path / "state"), tmp_path).release()


def test_a_port_of_the_systems_choice_keeps_nothing(tmp_path: Path):
    state = StateDirectory(Config(http=HttpConfig(port=0)), tmp_path)
    assert state.path == tmp_path / "state" and not state.outlives
    state.release()


@pytest.mark.parametrize("fault", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_nothing_is_said_and_served_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: int
):
    opened = os.open

    def faulty(path: Path, *arguments: int, **more: int) -> int:
        if Path(path).is_relative_to(tmp_path / "disk"):
            raise OSError(fault, os.strerror(fault))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(state_module.os, "open", faulty)
    with caplog.at_level(logging.WARNING):
        state = StateDirectory(configured(tmp_path / "disk"), tmp_path / "scratch")
    assert state.path == tmp_path / "scratch" / "state" and not state.outlives
    assert caplog.text.count("nothing outlives this server") == 1
    assert os.strerror(fault) in caplog.text
    state.release()


def test_a_directory_that_cannot_be_one_is_a_mistake(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"telemetry\.state_dir"):
        StateDirectory(configured(tmp_path / "file" / "state"), tmp_path)
