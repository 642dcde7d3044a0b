"""What is kept is whole, of its version, or set aside."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jaxserve.telemetry.document import Document


def test_what_was_saved_is_loaded(tmp_path: Path):
    document = Document(tmp_path / "a.json", 1)
    assert document.load() is None
    document.save({"x": [1, 2]})
    assert document.load() == {"version": 1, "x": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", ['{"version": 2}', "[1]", '{"versi', "\x00\xff"])
def test_what_cannot_be_used_is_set_aside(tmp_path: Path, content: str):
    file = tmp_path / "a.json"
    file.write_bytes(content.encode("latin-1"))
    document = Document(file, 1)
    assert document.load() is None
    assert not file.exists()
    assert (tmp_path / "a.broken").read_bytes() == content.encode("latin-1")
    document.save({})
    assert document.load() == {"version": 1}


def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    document = Document(tmp_path / "a.json", 1)
    document.save({"x": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        document.save({"x": 2})
    monkeypatch.undo()
    assert document.load() == {"version": 1, "x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
