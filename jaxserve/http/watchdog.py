"""Sees from outside that an engine hangs, by its flight recorder, so that it can be killed.

A process that is stopped, or whose device call never returns, cannot watch itself. The recorder
says until when the step that runs must be done (a deadline scaled by its program,
`engine.recorder`) and when the loop last turned. Start-up has its own time: it must stir within
`START_SILENCE_S`, or `engine.step_timeout_s` if that is longer. A bound on steps says nothing of
how long a new process imports.
"""

from __future__ import annotations

import asyncio
import time

from jaxserve.config import EngineConfig
from jaxserve.protocol.flight import Cell, FlightFile, Phase

#: How often the recorder is read; an engine that is late so many times in a row hangs.
POLL_S = 0.1
NUM_LATE = 3
#: A watcher that was itself held up for longer does not judge by what it then sees.
STALL_S = 0.5
#: How long an idle loop may wait for messages (`engine.loop.IDLE_WAIT_S`), and more.
IDLE_S = 1.0
#: How long a starting engine may say nothing, at least.
START_SILENCE_S = 60.0


async def hung(flight: FlightFile, config: EngineConfig) -> str:
    """Waits until an engine hangs; returns the sentence that says how."""
    started_ns = time.monotonic_ns()
    num_late = 0
    while True:
        asleep_ns = time.monotonic_ns()
        await asyncio.sleep(POLL_S)
        now_ns = time.monotonic_ns()
        late = overdue(flight, config, now_ns, started_ns)
        held_up = (now_ns - asleep_ns) / 1e9 > POLL_S + STALL_S
        num_late = num_late + 1 if late and not held_up else 0
        if late and num_late == NUM_LATE:
            return late


def overdue(flight: FlightFile, config: EngineConfig, now_ns: int, started_ns: int) -> str | None:
    """How an engine is late by now; None if it is not.

    Args:
        started_ns: when its process was started.
    """
    silent_s = (now_ns - max(flight.get(Cell.TURNED_NS), started_ns)) / 1e9
    if flight.get(Cell.PHASE) != Phase.SERVING:
        if silent_s > max(config.step_timeout_s, START_SILENCE_S):
            return f"the engine has not stirred for {silent_s:.1f} s of its start"
        return None
    deadline_ns = flight.get(Cell.DEADLINE_NS)
    if deadline_ns:
        late_s = (now_ns - deadline_ns) / 1e9
        return f"a step is {late_s:.1f} s over its deadline" if late_s > 0 else None
    if silent_s > config.step_deadline_floor_s + IDLE_S:
        return f"the engine's loop has not turned for {silent_s:.1f} s"
    return None
