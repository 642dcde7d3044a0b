"""Findings and the targets that they are held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure.

    Attributes:
        relation: "<" or ">=" a target; "" for a figure that has none.
    """

    name: str
    value: float
    relation: str = ""
    target: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the target is reached; a figure without one always is."""
        if self.target is None:
            return True
        return self.value < self.target if self.relation == "<" else self.value >= self.target

    def line(self) -> str:
        """Of the table."""
        wanted = "" if self.target is None else f"{self.relation} {self.target:g}"
        verdict = "" if self.target is None else ("ok" if self.is_met else "MISSED")
        return f"{self.name:<64} {self.value:>12.5g} {wanted:>8} {verdict}"
