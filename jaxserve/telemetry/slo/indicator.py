"""What is looked at of a request, without how often it must be good.

Two objectives that differ in their share only ("p99 ttft < 100 ms", "p90 ttft < 100 ms") have one
indicator, and share its counts.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property

#: Routes whose answers are not generated: they have no first token.
TEXT_ROUTES = frozenset({"/v1/embeddings", "/v1/score", "/v1/rerank"})


class Kind(enum.StrEnum):
    """What is promised."""

    TTFT = "ttft"  # time to first token, from the first byte of the request's head
    TPOT = "tpot"  # time per output token after the first
    E2E = "e2e"  # time to the last byte
    ERROR_RATE = "error_rate"
    AVAILABILITY = "availability"

    @property
    def is_latency(self) -> bool:
        """Whether it is a time, with a threshold."""
        return self in (Kind.TTFT, Kind.TPOT, Kind.E2E)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a request falls under objectives by.

    Attributes:
        model: empty while nobody has read what it asks for; it may then be any.
    """

    route: str
    model: str = ""
    tenant: str = ""
    priority: int = 0
    adapter: str = ""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Whose requests are meant; all where everything is empty.

    Attributes:
        model, tenant, adapter: globs, of which one must match.
        priority: "high" (below 0), "normal" (0), "low" (above 0), or an integer.
    """

    model: tuple[str, ...] = ()
    tenant: tuple[str, ...] = ()
    priority: str = ""
    adapter: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As it is written in an objective."""
        words = [
            f"{name}={'|'.join(globs)}"
            for name, globs in (
                ("model", self.model), ("tenant", self.tenant), ("adapter", self.adapter)
            )
            if globs
        ]  # fmt: skip
        return " ".join([*words, *([f"priority={self.priority}"] if self.priority else [])])

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str] | None, ...]:
        return tuple(
            re.compile("|".join(translate(glob) for glob in globs)) if globs else None
            for globs in (self.model, self.tenant, self.adapter)
        )

    def covers(self, labels: Labels) -> bool:
        """Whether a request is meant."""
        model, tenant, adapter = self._patterns
        if tenant is not None and not tenant.match(labels.tenant):
            return False
        if self.priority and not _is_of(self.priority, labels.priority):
            return False
        if not labels.model:  # turned away unread
            return True
        if model is not None and not model.match(labels.model):
            return False
        return adapter is None or adapter.match(labels.adapter) is not None


@dataclass(frozen=True, kw_only=True)
class Indicator:
    """See the module.

    Attributes:
        threshold_ns: of a time; 0 otherwise.
        threshold: the same as it is written.
    """

    kind: Kind
    threshold_ns: int = 0
    threshold: str = ""
    scope: Scope = field(default_factory=Scope)

    @property
    def key(self) -> str:
        """By which its counts are found again."""
        what = f"{self.kind} < {self.threshold_ns} ns" if self.threshold_ns else str(self.kind)
        return f"{what} {self.scope.text}".strip()

    def covers(self, labels: Labels) -> bool:
        """Whether a request falls under it."""
        if self.kind in (Kind.TTFT, Kind.TPOT) and labels.route in TEXT_ROUTES:
            return False
        return self.scope.covers(labels)


def _is_of(wanted: str, priority: int) -> bool:
    match wanted:
        case "high":
            return priority < 0
        case "normal":
            return priority == 0
        case "low":
            return priority > 0
    return priority == int(wanted)
