"""Starts an engine process and ends it: how HTTP and offline programs get their engine.

The engine half is never imported here: the child runs `python -m jaxserve.engine.process`, reads
its configuration from stdin (secrets stay out of the argument list) and binds its socket in a
directory that only this user may enter. The child dies with its parent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from jaxserve.config import Config
from jaxserve.protocol import messages
from jaxserve.protocol.scratch import ScratchDirectory


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine process is told by its parent.

    Attributes:
        flight: file of its flight recorder (`protocol.flight`), where the parent watches it.
        trials: groups of request keys that are to run apart (`engine.probation`).
        quarantined: keys of requests that it refuses.
        messages: what the parent's messages look like (`fingerprint`). An engine that is started
            again hours later may find newer code on the disk, which its clients do not speak.
    """

    config: Config
    flight: Path | None = None
    trials: tuple[tuple[str, ...], ...] = ()
    quarantined: tuple[str, ...] = ()
    messages: str = field(default_factory=lambda: fingerprint())


def fingerprint() -> str:
    """The fields of all messages in their order, which is how they are encoded, as a hash."""
    kinds = [kind for kind in vars(messages).values() if isinstance(kind, type)]
    layout = [
        (kind.__name__, [(key.name, str(key.type)) for key in dataclasses.fields(kind)])
        for kind in kinds
        if dataclasses.is_dataclass(kind)
    ]
    return hashlib.sha256(repr(layout).encode()).hexdigest()


class EngineProcess:
    """A running engine process.

    Attributes:
        address: where `protocol.zmq.ZmqClient` connects; known to other HTTP workers by argument.
        pid: of the process.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], scratch: ScratchDirectory, address: str
    ) -> None:
        self._process = process
        self._scratch = scratch
        self.address = address
        self.pid = process.pid

    @classmethod
    def start(
        cls, config: Config | EngineSettings, *, module: str = "jaxserve.engine.process"
    ) -> Self:
        """Starts the child; it loads and compiles while clients already may connect.

        Args:
            config: or all that it is told, where that is more.

        Raises:
            ConfigError: there is no place for its socket.
        """
        scratch = ScratchDirectory()
        address = f"ipc://{scratch.path / 'engine'}"
        process = subprocess.Popen(
            [sys.executable, "-m", module, address, str(os.getpid())], stdin=subprocess.PIPE
        )
        assert process.stdin is not None
        settings = config if isinstance(config, EngineSettings) else EngineSettings(config=config)
        try:
            process.stdin.write(pickle.dumps(settings))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; `poll` says so
        return cls(process, scratch, address)

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Ends it at once, also where it is stopped or hangs; `stop` cleans up behind it."""
        self._process.kill()

    def stop(self, timeout_s: float = 10.0) -> int:
        """Asks it to end, insists after `timeout_s`; returns its exit status."""
        self._process.terminate()
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._scratch.remove()
        return status
