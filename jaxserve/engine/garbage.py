"""When Python's garbage collector runs in the engine process: beside the device, not in a plan.

Reference counts free what a step leaves behind; the collector is for cycles only, of which serving
makes few. Left to itself it runs whenever 700 more containers live than before, so within most
plans that let many sequences in, and now and then visits all that live: with 100,000 waiting, 1.2
million containers, for 0.7 s (CPU time on a busy machine, 2 x AMD EPYC, 2026-11-26). So here it is
asked, and has three occasions:

    start-up is over     all, once; what lives by then (modules, programs) is not visited again
    a step is launched   what came since the last time, if that is `YOUNG` containers: the host
                         would wait for the device
    nothing to do        all, where `ALL_EVERY_S` have passed, so that no cycle stays for ever

An engine that is always busy has the third all the same, every `ALL_AT_LEAST_EVERY_S`.

The policy is the whole process's, so only an engine that has one of its own sets it: in a thread of
somebody's program (`engine.thread`) the collector stays as it was.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Protocol

#: Containers that came and live, before they are looked at: tenths of a millisecond.
YOUNG = 5_000
ALL_EVERY_S = 10.0
ALL_AT_LEAST_EVERY_S = 3600.0


class Collector(Protocol):
    """Told by the step loop when there is time."""

    def launched(self) -> None:
        """The device has a step to do."""
        ...

    def idle(self) -> None:
        """Nobody has."""
        ...


class NoCollector:
    """Python's own policy."""

    def launched(self) -> None:
        """See `Collector`."""

    def idle(self) -> None:
        """See `Collector`."""


class GarbageCollector:
    """Takes the collector over, from here on; see the module.

    Args:
        clock_s: CLOCK_MONOTONIC in seconds.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        gc.disable()
        gc.collect()
        gc.freeze()
        self._all_at_s = clock_s()

    def launched(self) -> None:
        """See `Collector`."""
        if gc.get_count()[0] < YOUNG:
            return
        if self._clock_s() - self._all_at_s > ALL_AT_LEAST_EVERY_S:
            self._collect_all()
        else:
            gc.collect(1)

    def idle(self) -> None:
        """See `Collector`."""
        if self._clock_s() - self._all_at_s > ALL_EVERY_S:
            self._collect_all()

    def _collect_all(self) -> None:
        gc.collect()
        self._all_at_s = self._clock_s()
