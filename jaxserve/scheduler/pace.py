"""How many prefill tokens a step may bring, so that decoding rows wait no longer than they should.

`scheduler.max_step_ms` is a target for steps that have decoding rows. What a step takes is learned
from measured ones: the range of step sizes (decode rows and prefill tokens together) is cut into
bins, each a quarter wider than the one before, and each bin has its time. A step program pads its
tokens, so times rise in stairs: a bin knows on which stair it is, which no straight line would.

    time(bin) = speed x shape(bin)        the device's speed now; how bins compare
    promise   = time x (1 + 4 x spread)   spread: how far times stray, as in TCP's timeouts

The budget is the largest bin whose promise is under the target; a bin that was never seen is
judged by the line through the two seen nearest to it. When the device slows down or speeds up,
`speed` follows within a few steps, and with it all bins. A bin found too slow is forgotten after
`TRY_AGAIN` measured steps, so that one odd measurement does not rule it out for ever, and now and
then the next bin is tried though the line says no, since it may be on the same stair: after
`TRY_FIRST` steps, and with each time that it was in vain after twice as many, up to `TRY_AGAIN`. A
bin is tried by one step, and not again before that was measured.

Invariants: at least `MIN_CHUNK_TOKENS` are allowed (prefill never stops), at most the whole budget,
which is also what a step without decoding rows gets.
"""

from __future__ import annotations

import bisect
import math
from typing import cast

#: Least prefill tokens of a step, whatever it costs.
MIN_CHUNK_TOKENS = 16
#: Bins grow by this factor.
GROWTH = 1.25
#: Measured steps after which a bin that was found too slow, or should be, may be tried.
TRY_FIRST, TRY_AGAIN = 32, 500
#: Measured steps until a step that tries a bin has been read back.
READ_AFTER = 4
#: Weights of a new measurement.
SPEED_GAIN, SHAPE_GAIN, SPREAD_GAIN = 1 / 4, 1 / 16, 1 / 16
#: A measurement is taken as at most so many times what was expected, or this part of it.
MOST_STRAY = 4.0


class Pacer:
    """See the module.

    Args:
        max_step_ms: the target; 0 sets no bound.
        max_step_tokens: of one step.
    """

    def __init__(self, max_step_ms: float, max_step_tokens: int) -> None:
        self._target_ns = max_step_ms * 1e6
        self._sizes = _sizes(max_step_tokens)
        self._shapes: list[float | None] = [None] * len(self._sizes)
        self._seen_at = [0] * len(self._sizes)
        self._num_measured = 0
        self._speed = 1.0
        self._spread = 0.05
        self._tried_at = -READ_AFTER
        self._dared_at = 0  # when a bin was last tried against the line
        self._dared = -1  # which, until it is measured
        self._patience = TRY_FIRST

    def budget(self, num_decode_rows: int, most: int) -> int:
        """Prefill tokens that a step may bring.

        Args:
            most: what the step can hold beside its decoding rows.
        """
        if not self._target_ns or not num_decode_rows:
            return most
        size = self._largest(num_decode_rows)
        return min(max(size - num_decode_rows, MIN_CHUNK_TOKENS), most)

    def observe(self, num_tokens: int, device_ns: float) -> None:
        """A step was measured.

        Args:
            num_tokens: decoding rows and prefill tokens, of one decode step.
            device_ns: of one decode step; 0 where it was not measured.
        """
        if not self._target_ns or device_ns <= 0 or num_tokens <= 0:
            return
        self._num_measured += 1
        place = self._place(num_tokens)
        shape = self._shapes[place]
        self._seen_at[place] = self._num_measured
        if place == self._dared:
            self._dared = -1
            in_vain = device_ns > self._target_ns
            self._patience = min(2 * self._patience, TRY_AGAIN) if in_vain else TRY_FIRST
        if shape is None:
            self._shapes[place] = device_ns / self._speed
            return
        ratio = device_ns / (self._speed * shape)
        ratio = min(max(ratio, 1 / MOST_STRAY), MOST_STRAY)
        self._spread += SPREAD_GAIN * (abs(math.log(ratio)) - self._spread)
        self._speed *= ratio**SPEED_GAIN
        self._shapes[place] = shape * ratio**SHAPE_GAIN

    def _largest(self, num_decode_rows: int) -> int:
        """The largest size whose promise is under the target; the smallest one if none is."""
        limit = self._target_ns / (self._speed * (1 + 4 * self._spread))
        first = self._place(num_decode_rows)
        known = [place for place in range(len(self._sizes)) if self._known(place, limit)]
        best = self._sizes[first]
        for place in range(first, len(self._sizes)):
            shape = self._shapes[place]
            if shape is None and (not known or place > known[-1]):
                return self._try(known, place, limit) or best
            if (self._between(known, place) if shape is None else shape) > limit:
                break
            best = self._sizes[place]
        return best

    def _try(self, known: list[int], place: int, limit: float) -> int:
        """The size of a bin that was never seen, if this step should try it; else 0."""
        now = self._num_measured
        if now - self._tried_at < READ_AFTER:
            return 0
        if self._between(known, place) > limit:
            if now - self._dared_at < self._patience:
                return 0
            self._dared, self._dared_at = place, now
        self._tried_at = now
        return self._sizes[place]

    def _known(self, place: int, limit: float) -> bool:
        """Whether a bin has been seen; one that was too slow long ago is forgotten."""
        shape = self._shapes[place]
        if shape is None:
            return False
        if shape > limit and self._num_measured - self._seen_at[place] > TRY_AGAIN:
            self._shapes[place] = None
            return False
        return True

    def _between(self, known: list[int], place: int) -> float:
        """What a bin that was never seen should take, by the two seen ones nearest to it."""
        if not known:
            return math.inf
        index = bisect.bisect(known, place)
        near = known[max(min(index, len(known) - 1) - 1, 0) :][:2]
        (size_0, shape_0), (size_1, shape_1) = (
            (self._sizes[n], cast(float, self._shapes[n])) for n in (near[0], near[-1])
        )
        if size_0 == size_1:
            return shape_1 * self._sizes[place] / size_1
        slope = max(shape_1 - shape_0, 0.0) / (size_1 - size_0)
        return shape_1 + slope * (self._sizes[place] - size_1)

    def _place(self, num_tokens: int) -> int:
        for place, size in enumerate(self._sizes):
            if num_tokens <= size:
                return place
        return len(self._sizes) - 1


def _sizes(most: int) -> list[int]:
    sizes = []
    size = 1.0
    while size < most:
        if not sizes or round(size) > sizes[-1]:
            sizes.append(round(size))
        size *= GROWTH
    return [*sizes, most]
