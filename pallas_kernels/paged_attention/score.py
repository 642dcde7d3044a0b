"""How a score is made from q·k; the same for every backend."""

from __future__ import annotations

from typing import NamedTuple

#: Below every score: a maximum of nothing, which no exponential turns into NaN.
LOWEST = -1e30


class Score(NamedTuple):
    """What is done to q·k before the softmax.

    Attributes:
        scale: multiplies it.
        window: positions that a query sees, itself included; None for all.
        soft_cap: it becomes soft_cap * tanh(it / soft_cap); None for no cap.
    """

    scale: float
    window: int | None
    soft_cap: float | None
