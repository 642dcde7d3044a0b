"""Signs of life of an engine: a client asks for its status at each beat, and watches its process.

Where somebody else watches the engine's process, silence and the process's end are nothing here. A
client that itself stood still for long may have been given up by the engine: it must begin anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.protocol.transport import HEARTBEAT_S, MAX_PAUSE_S


class Pulse:
    """The beats of an asyncio client, in its event loop.

    Args:
        ask: sends for the engine's status.
        fail: called with what the engine has died of.
        silence_s: an engine not heard of for so long counts as dead.
        supervised: somebody else watches it.
        on_pause: called instead of `fail` where this process stood still for too long.
    """

    def __init__(
        self,
        ask: Callable[[], None],
        fail: Callable[[JaxserveError], None],
        *,
        silence_s: float,
        supervised: bool,
        on_pause: Callable[[], None] | None = None,
    ) -> None:
        self._on_pause = on_pause
        self._ask = ask
        self._fail = fail
        self._silence_s = silence_s
        self._supervised = supervised
        self._heart: asyncio.Task[None] | None = None
        self._pidfd: int | None = None
        self._heard_ns = time.monotonic_ns()

    def start(self) -> None:
        """Begins to ask."""
        self._heart = asyncio.create_task(self._beat(), name="jaxserve engine heartbeat")

    def heard(self) -> None:
        """The engine has said something, or another is being listened to."""
        self._heard_ns = time.monotonic_ns()

    def watch(self, pid: int) -> None:
        """Has the event loop report the end of the engine's process, child of ours or not."""
        if self._supervised or self._pidfd is not None or pid == os.getpid():
            return
        if not hasattr(os, "pidfd_open"):
            return  # not Linux: heartbeats remain
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_exit(pid)
        except OSError:
            return  # another pid namespace, or no such call here: heartbeats remain
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit, pid)

    async def stop(self) -> None:
        """Asks and watches no more."""
        if self._heart is not None:
            self._heart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._heart
        self._unwatch()

    async def _beat(self) -> None:
        while True:
            self._ask()
            before_ns = time.monotonic_ns()
            await asyncio.sleep(HEARTBEAT_S)
            paused_s = (time.monotonic_ns() - before_ns) / 1e9 - HEARTBEAT_S
            if paused_s > MAX_PAUSE_S:  # the engine may have given up on us, and say no more
                if self._on_pause is not None:
                    self._on_pause()
                else:
                    self._fail(DeviceFailure(f"this process stood still for {paused_s:.0f} s"))
            silent_s = (time.monotonic_ns() - self._heard_ns) / 1e9
            if silent_s > self._silence_s and not self._supervised:
                self._fail(DeviceFailure(f"the engine has been silent for {silent_s:.0f} s"))

    def _on_exit(self, pid: int) -> None:
        self._unwatch()
        self._fail(DeviceFailure(f"the engine process (pid {pid}) has ended; try again shortly"))

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
