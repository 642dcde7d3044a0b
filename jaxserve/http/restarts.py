"""Starts the engine again where one of several hosts was lost; all of `serve` on the other hosts.

    host 0       serve ─┬─ engine ◀──────┐
                        └─ HTTP workers  │ plans (device/hosts.py)
    host 1 …     serve ─── engine ◀──────┘

The loss of one host ends the engines of all. Each host's `serve` starts its own again, and they
meet as they did at first. An engine that said in one sentence why it cannot start (a wrong setting,
a missing file) would say it again: that ends `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time

from jaxserve.config import Config
from jaxserve.protocol.spawn import EngineProcess

#: Status of an engine that has said on stderr why it could not start.
EXIT_TOLD = 1
#: An engine that lived this long is started again at once.
_LONG_LIFE_S = 60.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


def may_restart(config: Config, status: int) -> bool:
    """Whether an engine that ended by itself with this status is started again."""
    return config.parallel.hosts > 1 and status not in (0, EXIT_TOLD)


def describe_end(status: int) -> str:
    """How an engine process ended."""
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the engine process ended {how}"


class Backoff:
    """Pauses between lives: none, then 1 s, doubled up to half a minute while lives are short."""

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._started_s = time.monotonic()

    def started(self) -> None:
        """A life begins."""
        self._started_s = time.monotonic()

    def next_pause_s(self) -> float:
        """A life has ended: how long to wait before the next."""
        if time.monotonic() - self._started_s > _LONG_LIFE_S:
            self._pause_s = 0.0
        pause_s = self._pause_s
        self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * pause_s))
        return pause_s


async def run_follower(config: Config, engine_module: str) -> int:
    """`serve` on a host other than number 0: an engine, started again until SIGTERM or SIGINT.

    Returns:
        The exit status: 0 after a signal, 1 after an error that was told.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    backoff = Backoff()
    while True:
        backoff.started()
        engine = EngineProcess.start(config, module=engine_module)
        end = asyncio.create_task(ended(engine.pid))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait([end, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in (end, stop):
            task.cancel()
        await asyncio.gather(end, stop, return_exceptions=True)
        status = engine.poll()
        engine.stop()
        if stopping.is_set():
            return 0
        assert status is not None, "its pidfd said that it has ended"
        if not may_restart(config, status):
            return 1
        sys.stderr.write(f"jaxserve: {describe_end(status)}; it is started again\n")
        if await waited(stopping, backoff.next_pause_s()):
            return 0


async def waited(stopping: asyncio.Event, pause_s: float) -> bool:
    """Waits so long, or until `stopping` is set: returns whether it is."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), pause_s)
    return stopping.is_set()


async def ended(pid: int) -> None:
    """Waits for the end of a child, without reaping it."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()
    fd = os.pidfd_open(pid)
    loop.add_reader(fd, lambda: end.done() or end.set_result(None))
    try:
        await end
    finally:
        loop.remove_reader(fd)
        os.close(fd)
