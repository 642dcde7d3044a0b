"""What a step with drafts costs beside a plain one: measured, by the number of tokens.

A step that verifies drafts takes longer than one that decodes the same rows, by how much depends on
the device: a matrix that is read for one token is nearly free for a few more, until arithmetic is
the limit. Times are learned while serving, so nothing is configured.
"""

from __future__ import annotations

#: How much of a difference one measurement carries over: noise only ever makes a step longer.
_DOWN, _UP = 0.5, 0.1


class Curve:
    """Time of a step by its tokens, with straight lines between what was measured."""

    def __init__(self, max_tokens: int) -> None:
        self._measured = [0.0] * (max_tokens + 1)
        self._curve: list[float] | None = None

    @property
    def least(self) -> int:
        """The fewest tokens that were measured; 0 if none."""
        return next((tokens for tokens, ns in enumerate(self._measured) if ns), 0)

    def measure(self, num_tokens: int, ns: float) -> None:
        """A step took so long; more tokens than the curve has are ignored."""
        if not 0 < num_tokens < len(self._measured) or ns <= 0:
            return
        known = self._measured[num_tokens]
        weight = _DOWN if ns < known else _UP
        self._measured[num_tokens] = known + (ns - known) * weight if known else float(ns)
        self._curve = None

    def ns(self, num_tokens: int) -> float:
        """The time of a step; 0 while nothing was measured.

        Beyond the largest measured step it is that one's, so that larger ones are tried.
        """
        if self._curve is None:
            self._curve = self._lines()
        return self._curve[min(num_tokens, len(self._curve) - 1)]

    def _lines(self) -> list[float]:
        known = [(tokens, ns) for tokens, ns in enumerate(self._measured) if ns]
        if not known:
            return [0.0] * len(self._measured)
        curve = [known[0][1]] * known[0][0]
        for (low, low_ns), (high, high_ns) in zip(known, known[1:], strict=False):
            slope = (high_ns - low_ns) / (high - low)
            curve += [low_ns + slope * step for step in range(high - low)]
        return curve + [known[-1][1]] * (len(self._measured) - known[-1][0])


class DraftCosts:
    """Times of steps with and without drafts.

    Args:
        max_tokens: of a step with drafts.
    """

    def __init__(self, max_tokens: int) -> None:
        self._plain = Curve(max_tokens)
        self._verifying = Curve(max_tokens)

    def measure(self, num_tokens: int, ns: float, *, verifies: bool) -> None:
        """A step took so long on the device.

        Args:
            ns: with what the device waited for it, where it verifies: its drafts can only be made
                when the step before has been read. 0 where it was not measured.
        """
        (self._verifying if verifies else self._plain).measure(num_tokens, ns)

    def plain_ns(self, num_rows: int) -> float:
        """Of a step that decodes so many rows; 0 where it is not known."""
        return self._plain.ns(num_rows)

    def verify_ns(self, num_rows: int, num_drafts: int) -> float:
        """Of a step with drafts.

        Fewer drafts than were ever measured are taken to lie between them and a plain step; as
        long as nothing is measured they are free, so that they are tried.
        """
        least, num_tokens = self._verifying.least, num_rows + num_drafts
        if least <= num_rows or num_tokens >= least:
            return self._verifying.ns(num_tokens) or self.plain_ns(num_rows)
        plain = self.plain_ns(num_rows)
        return plain + (self._verifying.ns(least) - plain) * num_drafts / (least - num_rows)
