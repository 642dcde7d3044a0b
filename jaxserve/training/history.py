"""A run's losses by step: what is plotted, logged, and kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxserve.training.plot import Point, loss_plot


class History:
    """Grows with the run.

    Attributes:
        losses: step and mean loss of each update.
        held_out: step and mean loss over the held-out examples, of each evaluation.
    """

    def __init__(self, losses: Sequence[Point] = (), held_out: Sequence[Point] = ()) -> None:
        self.losses = [(int(step), float(loss)) for step, loss in losses]
        self.held_out = [(int(step), float(loss)) for step, loss in held_out]

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> History:
        """As `to_json` wrote it."""
        return cls(document["losses"], document["held_out"])

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"losses": self.losses, "held_out": self.held_out}

    def plot(self, title: str) -> str:
        """An SVG document."""
        return loss_plot(title, self.losses, self.held_out)
