"""Building the native library: what goes wrong is said, and half-built files are not left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import UnsupportedKernel, native


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_processor_lacks", lambda: None)


@pytest.mark.usefixtures("processor")
def test_no_compiler(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedKernel, match="no C\\+\\+ compiler .*apt install g"):
        native.build(tmp_path / "out", compilers=("no-such-compiler",))


@pytest.mark.usefixtures("processor")
def test_failing_compiler_leaves_nothing(tmp_path: Path) -> None:
    compiler = script(tmp_path, "echo 'disk full' >&2; exit 1")
    with pytest.raises(UnsupportedKernel, match="failed: disk full"):
        native.build(tmp_path / "out", compilers=(compiler,))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("processor")
def test_built_once(tmp_path: Path) -> None:
    compiler = script(
        tmp_path, f'echo built >> {tmp_path}/log; for last; do :; done; echo x > "$last"'
    )
    first = native.build(tmp_path / "out", compilers=(compiler,))
    second = native.build(tmp_path / "out", compilers=(compiler,))
    assert first == second and first.read_text() == "x\n"
    assert (tmp_path / "log").read_text() == "built\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [first.name]


@pytest.mark.usefixtures("processor")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UnsupportedKernel, match="cannot write"):
        native.build(tmp_path / "out", compilers=(script(tmp_path, "exit 0"),))


def test_processor_without_avx2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    with pytest.raises(UnsupportedKernel, match="aarch64"):
        native.build(tmp_path)


def test_installation_step_says_what_it_did() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.native"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "native kernels: " in done.stdout + done.stderr
