"""What a step with drafts takes beside a plain one: measured, by the number of its tokens.

By how much a step that verifies drafts is longer than one that decodes the same rows depends on the
device: weights that are read for one token serve a few more, until arithmetic is the limit. Times
are learned while serving, so there is nothing to configure.
"""

from __future__ import annotations

import itertools

#: Share of a difference that one measurement carries over: noise only ever makes a step longer.
_DOWN, _UP = 0.5, 0.1


class Curve:
    """Time of a step by its tokens, with straight lines between those that were measured.

    Attributes:
        least: the fewest tokens that were measured; 0 if none.
    """

    def __init__(self, max_tokens: int) -> None:
        self.least = 0
        self._measured = [0.0] * (max_tokens + 1)
        self._lines: list[float] = []

    def measure(self, num_tokens: int, ns: float) -> None:
        """A step took so long. Sizes beyond the curve, and times of 0, are ignored."""
        if not 0 < num_tokens < len(self._measured) or ns <= 0:
            return
        known = self._measured[num_tokens]
        weight = _DOWN if ns < known else _UP
        self._measured[num_tokens] = known + (ns - known) * weight if known else float(ns)
        self._lines = []

    def ns(self, num_tokens: int) -> float:
        """Time of a step; 0 while nothing was measured.

        Beyond the largest that was measured it is that one's, so that larger ones are tried.
        """
        if not self._lines:
            self._lines = self._draw()
        return self._lines[min(num_tokens, len(self._lines) - 1)]

    def _draw(self) -> list[float]:
        known = [(tokens, ns) for tokens, ns in enumerate(self._measured) if ns]
        if not known:
            return [0.0]
        self.least, least_ns = known[0]
        lines = [least_ns] * self.least
        for (low, low_ns), (high, high_ns) in itertools.pairwise(known):
            slope = (high_ns - low_ns) / (high - low)
            lines += [low_ns + slope * step for step in range(high - low)]
        return [*lines, known[-1][1]]


class DraftCosts:
    """Times of steps with and without drafts.

    Args:
        max_tokens: of a step with drafts.
    """

    def __init__(self, max_tokens: int) -> None:
        self._plain = Curve(max_tokens)
        self._verifying = Curve(max_tokens)

    def measure(self, num_tokens: int, ns: float, *, verifies: bool) -> None:
        """A step of rows without prompts took so long; 0 where it was not measured.

        Args:
            ns: of one with drafts, from when the device had nothing left to do: drafts can only
                be made once the tokens before them have been read.
        """
        (self._verifying if verifies else self._plain).measure(num_tokens, ns)

    def plain_ns(self, num_rows: int) -> float:
        """Time of a decode step; 0 while it is not known."""
        return self._plain.ns(num_rows)

    def verify_ns(self, num_rows: int, num_drafts: int) -> float:
        """Time of a step with drafts.

        With fewer than were ever measured it lies between that and a plain step's; as long as
        nothing is measured drafts are free, so that they are tried.
        """
        plain_ns, num_tokens = self.plain_ns(num_rows), num_rows + num_drafts
        least_ns = self._verifying.ns(0)
        least = self._verifying.least
        if not least_ns or not num_drafts:
            return plain_ns
        if num_rows < num_tokens < least:
            return plain_ns + (least_ns - plain_ns) * num_drafts / (least - num_rows)
        return self._verifying.ns(num_tokens)
