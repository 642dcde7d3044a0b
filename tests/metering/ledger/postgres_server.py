"""A real PostgreSQL for tests: on a port of its own, its files in a directory that goes with it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

TIMEOUT_S = 60
#: PostgreSQL refuses to run as root.
_NOBODY = 65534


def find_programs() -> Path:
    """The directory of initdb and postgres; skips the test where there is none."""
    on_path = shutil.which("postgres")
    places = [Path(on_path).parent] if on_path else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").exists():
            return place
    pytest.skip("needs PostgreSQL (Debian: apt install postgresql)")


class PostgresServer:
    """One server, which may be ended and started again with what it has.

    Attributes:
        port: on 127.0.0.1.
        url: of its database.
    """

    def __init__(self) -> None:
        self._programs = find_programs()
        self._folder = Path(tempfile.mkdtemp(prefix="jaxserve-postgres-"))
        self._process: subprocess.Popen | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"postgresql://ledger@127.0.0.1:{self.port}/postgres"
        self._identity = {"user": _NOBODY, "group": _NOBODY} if os.getuid() == 0 else {}
        if self._identity:
            os.chown(self._folder, _NOBODY, _NOBODY)
        made = subprocess.run(
            [
                *(self._programs / "initdb", "-D", self._folder / "data", "-U", "ledger"),
                *("-A", "trust", "--no-sync", "-E", "UTF8", "--locale", "C.UTF-8"),
            ],
            capture_output=True,
            text=True,
            cwd=self._folder,
            **self._identity,
        )
        assert made.returncode == 0, made.stderr

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        self._process = subprocess.Popen(
            [
                *(self._programs / "postgres", "-D", self._folder / "data", "-p", str(self.port)),
                *("-k", "", "-h", "127.0.0.1", "-c", "shared_buffers=32MB"),
            ],
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            **self._identity,
        )
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            assert self._process.poll() is None, "postgres ended"
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline_s, "postgres does not answer"
                time.sleep(0.02)

    def stop(self) -> None:
        """Ends it as a crash would: connections are cut, its log is replayed when it starts."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(TIMEOUT_S)
            self._process = None

    def remove(self) -> None:
        """Ends it, and deletes its files."""
        self.stop()
        shutil.rmtree(self._folder)
