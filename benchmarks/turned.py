"""An engine whose step loop a benchmark turns in its own thread, over a model that others share.

Two models of one process are not equally fast: each lies elsewhere in memory. So the arms of a
comparison are engines over the parts of one load, each with a batch builder of its own.
"""

from __future__ import annotations

import dataclasses
import time

from jaxserve.bench.engine import BenchServer
from jaxserve.config import Config
from jaxserve.engine.batches import Batches
from jaxserve.engine.loop import Engine
from jaxserve.engine.parts import Parts
from jaxserve.engine.process import build_engine
from jaxserve.engine.turn import InFlight
from jaxserve.protocol.messages import (
    Cancel,
    ClientMessage,
    EngineMessage,
    Submit,
    TokenSegment,
)
from jaxserve.types import SamplingParams


class Turned:
    """An engine, turned by the caller.

    Args:
        first: what its one client sends before all else.
    """

    def __init__(self, config: Config, parts: Parts, *first: ClientMessage) -> None:
        assert isinstance(parts.batch, Batches)
        batch = Batches(parts.batch.shapes, config.scheduler.max_rows)
        self._server = BenchServer()
        self._engine: Engine = build_engine(
            config, self._server, dataclasses.replace(parts, batch=batch)
        )
        self._server.inbox += first
        self._next_id = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs; what waits for its grammar or adapter does not count."""
        engine = self._engine
        waits = self._server.inbox or engine.scheduler.has_work
        return not waits and engine.in_flight is None

    def submit(self, prompt: list[int], sampling: SamplingParams) -> int:
        """A request; the id of its sequence."""
        self._next_id += 1
        self._server.inbox.append(
            Submit(
                sequence_ids=[self._next_id],
                prompt=[TokenSegment(token_ids=prompt)],
                sampling=sampling,
                arrived_ns=time.monotonic_ns(),
            )
        )
        return self._next_id

    def turn(self) -> list[EngineMessage]:
        """One turn of the loop; what it sent."""
        self._engine.receive(0.0)
        self._engine.step()
        messages, self._server.outbox = self._server.outbox, []
        return messages

    def settle(self) -> None:
        """Waits until the device is done with what was launched; reads nothing."""
        step = self._engine.in_flight
        if isinstance(step, InFlight):
            step.launched.token_ids()

    def finish(self, *ids: int) -> None:
        """Cancels these, and turns until nothing runs."""
        self._server.inbox.append(Cancel(sequence_ids=list(ids)))
        while not self.is_idle:
            self.turn()
