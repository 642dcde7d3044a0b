"""The lives of the engine: starts it, watches it, and starts it again when it has died.

    launch ──▶ a life ──▶ death ──▶ judge the requests in its last steps (http.suspects)
                 ▲                     │ within the budget
                 └──── pause ──────────┘ else "failed": the server ends

Death is the end of the process, whatever ended it, or a missed deadline (`http.watchdog`): then it
is killed here. HTTP workers live on and are told (`http.news`). An engine that said in one sentence
why it cannot start (a wrong setting, a missing file) would say it again: it is not started again.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from jaxserve.config import Config
from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.http.news import News
from jaxserve.http.restarts import (
    EXIT_TOLD,
    Backoff,
    Budget,
    describe_end,
    ended,
    may_restart,
)
from jaxserve.http.suspects import Suspects
from jaxserve.http.watchdog import hung
from jaxserve.protocol.client import EngineClient
from jaxserve.protocol.flight import FlightFile, flight_requests
from jaxserve.protocol.spawn import EngineProcess, EngineSettings
from jaxserve.protocol.status import Progress
from jaxserve.protocol.zmq import ZmqClient


class Lives:
    """See the module.

    Args:
        flight: where the flight recorder's file goes.
        module: what the engine's process runs.
        tell: passes news on to the workers.
        on_progress: told of start-up.
        on_ready: called each time an engine has become ready.
    """

    def __init__(
        self,
        config: Config,
        flight: Path,
        module: str,
        *,
        tell: Callable[[News], None],
        on_progress: Callable[[Progress], None],
        on_ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._config = config
        self._flight_path = flight
        self._module = module
        self._tell = tell
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._backoff = Backoff(config.engine.restart_backoff_s)
        self._budget = Budget(config.engine.max_restarts, config.engine.restart_window_s)
        self._suspects = Suspects()
        self._engine: EngineProcess | None = None
        self._flight: FlightFile | None = None
        self._largest = (0, 0)

    def launch(self) -> str:
        """Starts the engine's process; returns its address.

        Raises:
            ConfigError: there is no place for its socket.
            OSError: there is none for its flight recorder, or no process to be had.
        """
        config = self._config
        self._backoff.started()
        self._flight = FlightFile(self._flight_path, flight_requests(config))
        self._flight.start_from(self._largest)
        settings = EngineSettings(
            config=config,
            flight=self._flight.path,
            trials=self._suspects.trials,
            quarantined=self._suspects.quarantined,
        )
        self._engine = EngineProcess.start(settings, module=self._module)
        return self._engine.address

    async def run(self) -> int:
        """Keeps an engine running, after `launch`; returns the exit status once it must not be."""
        sentence = await self._live()
        while sentence is None:
            await asyncio.sleep(self._backoff.next_pause_s())
            try:
                address = self.launch()
            except (JaxserveError, OSError) as error:  # no room on the disk, no process to be had
                self.close()
                sentence = self._after(f"the engine process cannot be started: {error}", again=True)
                continue
            self._tell(News(state="started", address=address))
            sentence = await self._live()
        self._tell(News(state="failed", error=sentence))
        return 1

    def close(self) -> None:
        """Ends the engine, if it runs, and removes what it had."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None
        if self._flight is not None:
            self._flight.close()
            self._flight = None

    async def _live(self) -> str | None:
        """Waits for the end of one life; None if another may begin, or why not."""
        assert self._engine is not None and self._flight is not None
        await self._watch(self._engine, self._flight)
        status = self._engine.poll()
        assert status is not None, "its pidfd said that it has ended"
        before = self._suspects.quarantined
        self._suspects.judge(self._flight.last_steps())
        self._largest = self._flight.largest
        self.close()
        sentence = self._after(
            describe_end(status), again=may_restart(status), is_told=status == EXIT_TOLD
        )
        for key in self._suspects.quarantined[len(before) :]:
            _say(f"request {key} has ended the engine alone and is not run again")
        return sentence

    def _after(self, sentence: str, *, again: bool, is_told: bool = False) -> str | None:
        """Says how a life ended, or why none began; None if another may begin, or why not.

        Args:
            again: whether it may be started again, within the budget.
            is_told: the engine has said it itself.
        """
        if again and not self._budget.spend():
            again = False
            sentence += f": {self._budget}"
        if not is_told:
            _say(f"{sentence}; it is started again" if again else sentence)
        return None if again else sentence

    async def _watch(self, engine: EngineProcess, flight: FlightFile) -> None:
        """Waits for the end of the engine's process, which is killed if it hangs; tells of it."""
        client = EngineClient(ZmqClient(engine.address), on_progress=self._on_progress)
        await client.start()
        end = asyncio.create_task(ended(engine.pid))
        hang = asyncio.create_task(hung(flight, self._config.engine))
        ready = asyncio.create_task(self._announce(client))
        try:
            await asyncio.wait([end, hang], return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                _say(f"{hang.result()}; it is killed")
                engine.kill()
                await end
            self._tell(News(state="down"))
            client.fail(DeviceFailure("the engine process has ended"))
        finally:
            for task in (end, hang, ready):
                task.cancel()
            await asyncio.gather(end, hang, ready, return_exceptions=True)
            await client.close()

    async def _announce(self, client: EngineClient) -> None:
        await client.ready()
        await self._on_ready()


def _say(sentence: str) -> None:
    sys.stderr.write(f"jaxserve: {sentence}\n")
    sys.stderr.flush()
