"""When those that a full queue refuses may come again: one after another, as the queue empties.

Told the same time, they would all come at once and find it full again. So each is told a time of
its own, at the pace at which rows become free (or texts are embedded). Nobody's place is kept:
whoever comes in between may take it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jaxserve.errors import JaxserveError, Overloaded

#: The soonest time that is told, and the span over which times are spread. OpenAI's clients keep to
#: times of up to a minute.
SOONEST_S, SPAN_S = 1.0, 59.0
#: Sequences a second, where nothing has been measured yet.
FIRST_RATE = 1.0


class Comebacks:
    """Times to come again to one queue.

    Args:
        rate: sequences that leave the queue in a second; 0 where that is not known.
        clock_s: monotonic.
    """

    def __init__(
        self, rate: Callable[[], float], clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._clock_s = clock_s
        self._next_s = 0.0  # the first time that nobody was told

    def tell(self, error: JaxserveError, num_sequences: int) -> None:
        """Gives a refusal for want of room its time, unless it has one; leaves others alone."""
        if not isinstance(error, Overloaded) or error.retry_after_s is not None:
            return
        soonest_s = self._clock_s() + SOONEST_S
        at_s = max(self._next_s, soonest_s)
        if at_s > soonest_s + SPAN_S:  # once more through the span, between the times before
            at_s = soonest_s + (at_s - soonest_s) % SPAN_S
        self._next_s = at_s + num_sequences / (self._rate() or FIRST_RATE)
        error.retry_after_s = at_s - soonest_s + SOONEST_S
