"""Scratch directories: what a killed process left is removed, what is in use is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.protocol.scratch import ScratchDirectory

HOLDER = """
from jaxserve.protocol.scratch import ScratchDirectory
held = ScratchDirectory()
print(held.path, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def start_holder(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate()


def test_what_a_killed_process_left_is_removed_once_it_is_dead(temporary):
    process, left = start_holder(temporary)
    (left / "engine").write_bytes(b"")
    try:
        first = ScratchDirectory()
        assert left.is_dir(), "it was in use"
    finally:
        end(process, signal.SIGKILL)
    second = ScratchDirectory()
    assert not left.exists()
    assert first.path.is_dir()
    first.remove()
    second.remove()
    assert list(temporary.iterdir()) == []


def test_one_that_is_being_made_and_strangers_stay(temporary):
    for name in ("jaxserve-new", "jaxserve", "other-1"):
        (temporary / name).mkdir()
    (temporary / "other-1" / "lock").touch()
    ScratchDirectory().remove()
    assert sorted(path.name for path in temporary.iterdir()) == [
        "jaxserve", "jaxserve-new", "other-1"
    ]  # fmt: skip


def test_only_its_user_may_enter():
    scratch = ScratchDirectory()
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    scratch.remove()


def test_without_a_place_it_says_so(temporary, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(temporary / "missing"))
    with pytest.raises(ConfigError, match=r"temporary directory: .*missing.* set TMPDIR"):
        ScratchDirectory()
