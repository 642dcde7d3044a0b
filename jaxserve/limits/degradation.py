"""What is given up while the engine is overloaded, step by step, and taken back later.

Overload is an estimated wait of a request of normal priority above `limits.overload_wait_s`. Each
`limits.overload_after_s` that it lasts goes a level up; each as long below half of it, one down:

    0  nothing
    1  requests of low priority get at most `limits.low_priority_max_tokens`
    2  requests of low priority are refused
    3  requests of normal priority too, while the wait is above half of the threshold

Drafts are switched off by the engine itself when many rows run.
"""

from __future__ import annotations

from jaxserve.config import LimitsConfig

CAP_LOW, SHED_LOW, SHED_NORMAL = 1, 2, 3


class Degradation:
    """The level; see the module.

    Attributes:
        level: 0 to 3.
    """

    def __init__(self, config: LimitsConfig) -> None:
        self.level = 0
        self._threshold_s = config.overload_wait_s
        self._after_s = config.overload_after_s
        self._wait_s = 0.0
        self._seen_s = 0.0
        self._since_s: float | None = None  # since when it has been on one side
        self._rising = False

    @property
    def is_on(self) -> bool:
        """Whether anything is ever given up."""
        return self._threshold_s > 0

    def observe(self, wait_s: float, now_s: float) -> None:
        """The wait of a normal request is estimated to be this, now."""
        self._wait_s = wait_s
        before_s, self._seen_s = self._seen_s, now_s
        if wait_s > self._threshold_s:
            rising = True
        elif wait_s < self._threshold_s / 2:
            rising = False
        else:  # between the two it neither rises nor falls
            self._since_s = None
            return
        if self._since_s is None or rising != self._rising:
            self._rising = rising
            # It was calm since somebody last came, which may be long ago.
            self._since_s = now_s if rising else before_s
        steps = int((now_s - self._since_s) / self._after_s)
        if steps:
            self._since_s = now_s
            self.level = min(self.level + 1, SHED_NORMAL) if rising else max(self.level - steps, 0)

    def caps(self, priority: int) -> bool:
        """Whether a request of this priority gets fewer tokens."""
        return self.level >= CAP_LOW and priority > 0

    def sheds(self, priority: int) -> bool:
        """Whether a request of this priority is refused."""
        if priority > 0:
            return self.level >= SHED_LOW
        if priority == 0:
            return self.level >= SHED_NORMAL and self._wait_s > self._threshold_s / 2
        return False
