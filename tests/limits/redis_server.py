"""A real Redis (or Valkey) server for tests: on a Unix socket, without files, killed at the end."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

TIMEOUT_S = 30


def find_server() -> str:
    """The server's program; skips the test where there is none."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("needs redis-server or valkey-server (Debian: apt install redis-server)")
    return program


class RedisServer:
    """One server, which may be killed and started again on the same socket."""

    def __init__(self, folder: Path) -> None:
        self._program = find_server()
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        """Starts it, and waits until it accepts connections."""
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                self._program,
                *("--port", "0", "--unixsocket", str(self._socket)),
                *("--save", "", "--appendonly", "no", "--dir", str(self._socket.parent)),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            assert self._process.poll() is None, "redis-server ended"
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(self._socket))
                    return
            except OSError:
                assert time.monotonic() < deadline_s, "redis-server does not listen"
                time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
