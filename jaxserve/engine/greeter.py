"""Answers clients while the model loads and compiles, before the engine can.

A thread holds the transport until `stop`; then the engine's thread takes it over. Requests that
come too early are refused as `Overloaded`. On a host that follows host 0 nobody takes it over: the
thread goes on saying how the host is (`following`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable

from jaxserve.errors import Overloaded
from jaxserve.protocol.messages import (
    Embed,
    Finished,
    GetStatus,
    Goodbye,
    SequenceRecord,
    Submit,
    TokenEvents,
)
from jaxserve.protocol.server import ServerTransport
from jaxserve.protocol.status import EngineStatus, Progress
from jaxserve.types import FinishReason

#: How often progress is looked at.
TURN_S = 0.05
#: How long a start-up that failed waits for a first client to tell it to.
FAREWELL_S = 2.0


class Greeter:
    """Serves status and progress from its own thread.

    Attributes:
        clients: those that have come, and whether each wants step statistics.

    Args:
        on_turn: called each time it looks for messages: a sign of life.
    """

    def __init__(self, server: ServerTransport, on_turn: Callable[[], None] = lambda: None) -> None:
        self._on_turn = on_turn
        self.clients: dict[Hashable, bool] = {}
        self._server = server
        self._progress = Progress(phase="loading", done=0, total=0)
        self._since_ns = time.monotonic_ns()
        self._behind_s: Callable[[], float] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxserve greeter", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Start-up has come this far; clients hear of it within a moment. Any thread."""
        self._progress = Progress(phase=phase, done=done, total=total)

    def following(self, behind_s: Callable[[], float]) -> None:
        """The host makes host 0's device calls from now on, and counts as ready. Any thread.

        Args:
            behind_s: how long host 0 has waited for a call that is not made yet.
        """
        self._behind_s = behind_s

    def stop(self) -> None:
        """Ends the thread; the transport is the caller's from then on."""
        self._stopping.set()
        self._thread.join()

    def fail(self, error: str) -> None:
        """Tells the clients that start-up failed, and stops.

        A start-up may fail before any client came: the first one is waited for, within reason.
        """
        self.stop()
        deadline_s = time.monotonic() + FAREWELL_S
        while not self.clients and time.monotonic() < deadline_s:
            self._turn()
        for client in self.clients:
            self._server.send(client, self._status("failed", error))

    def _run(self) -> None:
        told = self._progress
        while not self._stopping.is_set():
            self._turn()
            progress = self._progress
            if progress is not told:
                told = progress
                for client in self.clients:
                    self._server.send(client, progress)

    def _turn(self) -> None:
        """Answers what has come, waiting a moment for it."""
        self._on_turn()
        for client, message in self._server.receive(TURN_S):
            match message:
                case GetStatus():
                    if client not in self.clients:
                        self._server.send(client, self._progress)
                    self.clients[client] = message.stats
                    status = self._status(self._progress.phase)
                    status.answers = message.number
                    self._server.send(client, status)
                case Submit() | Embed():
                    self._server.send(client, self._refusal(message))
                case Goodbye():
                    self.clients.pop(client, None)

    def _status(self, phase: str, error: str = "") -> EngineStatus:
        if self._behind_s is not None:
            return EngineStatus(state="ready", pid=os.getpid(), step_age_s=self._behind_s())
        state = "compiling" if phase == "ready" else phase
        age_s = (time.monotonic_ns() - self._since_ns) / 1e9
        return EngineStatus(state=state, pid=os.getpid(), step_age_s=age_s, error=error)

    def _refusal(self, message: Submit | Embed) -> TokenEvents:
        reason = f"the engine is still {self._progress.phase}; wait until it is ready"
        if self._behind_s is not None:
            reason = "this host follows host 0, which takes the requests"
        error = Overloaded(reason)
        now_ns = time.monotonic_ns()
        record = SequenceRecord(arrived_ns=message.arrived_ns, done_ns=now_ns)
        finished = [
            Finished(
                sequence_id=sequence_id,
                reason=FinishReason.ERROR,
                record=record,
                error=error.message,
                error_code=error.code,
            )
            for sequence_id in message.sequence_ids
        ]
        return TokenEvents(step_id=-1, at_ns=now_ns, finished=finished)
