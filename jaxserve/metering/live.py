"""What a million tokens cost now: of the requests that ended in the last minutes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from decimal import Decimal

from jaxserve.metering.entry import ZERO, Entry

#: So far back.
SPAN_S = 300.0
_MILLION = 10**6


@dataclass(slots=True)
class _Second:
    at_s: int
    prefill: Decimal = ZERO
    decode: Decimal = ZERO
    prompt_tokens: int = 0
    completion_tokens: int = 0
    whole: Decimal = ZERO


class LivePrices:
    """Adds up by seconds of the monotonic clock, so that it does not matter how many end."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque()

    def add(self, entry: Entry, now_s: float) -> None:
        """A request was priced."""
        second = self._second(now_s)
        second.prefill += entry.prefill_cost
        second.decode += entry.decode_cost
        second.prompt_tokens += entry.prompt_tokens
        second.completion_tokens += entry.completion_tokens

    def spent(self, cost: Decimal, now_s: float) -> None:
        """The machine and its energy have cost so much, busy or not."""
        self._second(now_s).whole += cost

    def per_million(self, now_s: float) -> dict[str, float]:
        """By kind: "input" and "output", what requests are charged; "all", what a token costs with
        waste and idle time. Only those that can be told.
        """
        while self._seconds and self._seconds[0].at_s < now_s - SPAN_S:
            self._seconds.popleft()
        prompt = sum(second.prompt_tokens for second in self._seconds)
        completion = sum(second.completion_tokens for second in self._seconds)
        pairs = {
            "input": (sum((second.prefill for second in self._seconds), ZERO), prompt),
            "output": (sum((second.decode for second in self._seconds), ZERO), completion),
            "all": (sum((second.whole for second in self._seconds), ZERO), prompt + completion),
        }
        return {
            kind: float(cost * _MILLION / tokens)
            for kind, (cost, tokens) in pairs.items()
            if tokens
        }

    def _second(self, now_s: float) -> _Second:
        if not self._seconds or self._seconds[-1].at_s != int(now_s):
            self._seconds.append(_Second(int(now_s)))
        return self._seconds[-1]
