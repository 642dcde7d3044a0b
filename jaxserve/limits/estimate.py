"""How many tokens a prompt may have, from its bytes, before it is tokenized.

The ratio of tokens to bytes is learned from the prompts that came: the upper end of the histogram
bin that 99 of 100 prompts stay under. Until it has seen enough it is 1, which no byte-level
tokenizer exceeds. Short prompts are mostly template, hence the constant on top of the bytes.
"""

from __future__ import annotations

import math

#: Bytes that stand for what a chat template adds: once, and for every message.
TEMPLATE_BYTES = 64
MESSAGE_BYTES = 32

_QUANTILE = 0.99
_BINS = 64
_LOWEST, _HIGHEST = 1 / 64, 4.0
_STEP = math.log(_HIGHEST / _LOWEST) / _BINS
#: Weight of the belief that it is 1, in prompts; and of all that is remembered.
_PRIOR = 2.0
_MEMORY = 4096.0


class TokenRatio:
    """The learned upper ratio of tokens to bytes of one tokenizer."""

    def __init__(self) -> None:
        self._counts = [0.0] * _BINS
        self._counts[_bin(1.0)] = _PRIOR
        self._total = _PRIOR
        self._ratio = 1.0

    @property
    def ratio(self) -> float:
        """Tokens a byte that 99 of 100 prompts stay under."""
        return self._ratio

    def estimate(self, num_bytes: int) -> int:
        """Tokens that so many bytes hardly exceed."""
        return math.ceil(num_bytes * self._ratio)

    def learn(self, num_bytes: int, num_tokens: int) -> None:
        """A prompt of so many bytes came to so many tokens."""
        if num_bytes <= 0:
            return
        self._counts[_bin(num_tokens / num_bytes)] += 1.0
        self._total += 1.0
        if self._total > _MEMORY:
            self._counts = [count / 2 for count in self._counts]
            self._total /= 2
        above = (1 - _QUANTILE) * self._total
        for index in range(_BINS - 1, -1, -1):
            above -= self._counts[index]
            if above < 0:
                self._ratio = _LOWEST * math.exp((index + 1) * _STEP)
                return


def _bin(ratio: float) -> int:
    """A ratio that is a bin's upper end belongs to it."""
    place = math.log(max(ratio, _LOWEST) / _LOWEST) / _STEP
    return min(max(math.ceil(place - 1e-9) - 1, 0), _BINS - 1)
