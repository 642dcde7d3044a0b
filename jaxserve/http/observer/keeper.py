"""Keeps the observer's process running: the supervisor's end.

Serving goes on without it. It is started again after each death, with growing pauses; one that does
not answer any more is killed first. What is wrong
in its settings is found before anything starts (`parts.check_parts`).
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from pathlib import Path

from jaxserve.config import Config
from jaxserve.http.observer.messages import TO_OBSERVER, TO_WORKER, Answer, Question
from jaxserve.http.observer.observer import ALIVE
from jaxserve.http.observer.process import ObserverSettings
from jaxserve.http.restarts import Backoff, ended
from jaxserve.protocol.frames import read_frame, write_frame
from jaxserve.telemetry.state import StateDirectory

#: Between questions whether it lives, and how long an answer may take.
CHECK_S = 10.0
HUNG_S = 60.0
#: At the end, how long it may take to keep what it has.
CLOSING_S = 10.0


class ObserverKeeper:
    """See the module. From `start` to `close`.

    Args:
        scratch: directory for its socket, and for its state where none is to stay.
        module: what the process runs.

    Attributes:
        socket: where workers find it.

    Raises:
        ConfigError: its state's directory cannot be used.
    """

    def __init__(
        self,
        config: Config,
        scratch: Path,
        module: str = "jaxserve.http.observer.process",
    ) -> None:
        self.socket = scratch / "observer"
        self._module = module
        self._state = StateDirectory(config, scratch)
        self._settings = ObserverSettings(
            config=config,
            socket=self.socket,
            state=self._state.path,
            outlives=self._state.outlives,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._answered = False

    @property
    def pid(self) -> int | None:
        """Of the process that runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts it, and again whenever it ends."""
        self._launch()
        self._task = asyncio.create_task(self._keep(), name="jaxserve observer keeper")

    async def close(self) -> None:
        """Has it keep what it has, and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(CLOSING_S):
                    await ended(self._process.pid)
            except TimeoutError:
                self._process.kill()
            self._process.wait()
        self._state.release()

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(os.getpid())], stdin=subprocess.PIPE
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(pickle.dumps(self._settings))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; its end is noticed

    async def _keep(self) -> None:
        backoff = Backoff(1.0)
        while True:
            assert self._process is not None
            backoff.started()
            watch = asyncio.create_task(self._watch(self._process), name="jaxserve observer watch")
            try:
                await ended(self._process.pid)
            finally:
                watch.cancel()
            status = self._process.wait()
            sys.stderr.write(
                f"jaxserve: the observer has ended with status {status}; it is started again, "
                "and serving goes on\n"
            )
            await asyncio.sleep(backoff.next_pause_s())
            self._launch()

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kills it if it hangs; one that has answered once is asked again and again."""
        self._answered = False
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                async with asyncio.timeout(HUNG_S):
                    await self._ask()
                self._answered = True
            except TimeoutError:
                if self._answered:
                    sys.stderr.write(f"jaxserve: the observer is silent for {HUNG_S:g} s\n")
                    process.kill()
                    return
            except (OSError, asyncio.IncompleteReadError, ValueError):
                continue  # it begins, or ends

    async def _ask(self) -> None:
        """Waits for an answer."""
        reader, writer = await asyncio.open_unix_connection(self.socket)
        try:
            write_frame(writer, TO_OBSERVER.encode(Question(id=1, name=ALIVE)))
            while not isinstance(TO_WORKER.decode(await read_frame(reader)), Answer):
                pass  # what all workers are told comes first
        finally:
            writer.close()
