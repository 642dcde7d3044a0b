"""A whole server over the fake engine, whose processes' CPU time can be told apart."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_S = 120
CPU_CLOCK = 2  # of clock_getcpuclockid: all threads of a process


class WholeServer:
    """Supervisor, engine, one HTTP worker, observer: each known by what it does.

    Args:
        settings: as after `--set`.
        step_ms: of the fake engine; 0 never waits.
    """

    def __init__(self, settings: tuple[str, ...], step_ms: float) -> None:
        engine = "tests.fakes.paced_engine" if step_ms else "tests.fakes.engine"
        pace = {"FAKE_STEP_MS": str(step_ms), "FAKE_PREFILL_TOKEN_US": "0"}
        self._state = tempfile.TemporaryDirectory(prefix="jaxserve-bench-")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.fakes.serve", f"engine={engine}"),
                *(f"telemetry.state_dir={self._state.name}", *settings),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | pace | {"PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready on "):
            self.close()
            raise SystemExit(f"the server has not started with {' '.join(settings)}")
        self.base = line.split()[-1]
        self.port = int(self.base.rpartition(":")[2])
        self._wait_until_ready()
        self._serving = self._pids("fakes.http_worker", engine)
        self._observing = self._pids("observer.process")

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(urllib.error.HTTPError):  # 503 until it is
                urllib.request.urlopen(f"{self.base}/ready", timeout=START_S).close()
                return
            time.sleep(0.1)
        self.close()
        raise SystemExit("the server does not get ready")

    def parts(self) -> set[str]:
        """Of its observer, by name."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            with urllib.request.urlopen(f"{self.base}/metrics", timeout=START_S) as response:
                text = response.read().decode()
            if not self._observing or "jaxserve_observer_up 1.0" in text:
                return set(re.findall(r'jaxserve_observer_faults_total{part="([^"]*)"}', text))
            time.sleep(0.1)
        raise SystemExit("the observer does not answer")

    def cpu_s(self) -> tuple[float, float]:
        """What those who serve, and the observer, have used."""
        return _cpu_s(self._serving), _cpu_s(self._observing)

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.communicate()
        self._state.cleanup()

    def _pids(self, *modules: str) -> list[int]:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        found = []
        for pid in map(int, children.split()):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            if any(module in command for module in modules):
                found.append(pid)
        return found


def _cpu_s(pids: list[int]) -> float:
    return sum(time.clock_gettime((~pid << 3) | CPU_CLOCK) for pid in pids)
