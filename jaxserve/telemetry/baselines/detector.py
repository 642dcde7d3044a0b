"""Finds, sample by sample, that a series has shifted from its baseline.

Each sample is replaced by its normal score among the baseline's: the quantile of the standard
normal at its rank. Whatever the noise is like (heavy tails, two modes), scores of a series that has
not changed are as good as standard normal, and one outlier counts no more than the baseline's
largest sample. A one-sided CUSUM of the scores (Page 1954) then finds a lasting shift:

    S ← max(0, S + score − K),  shifted when S > H · (1 + r) / (1 − r)

r is the lag-1 correlation of the baseline's scores: samples that follow one another say less than
independent ones. K and H were chosen by simulated series (tests/telemetry/baselines): they find 2.5
standard deviations within 10 samples, and are wrong less than once in 10,000.

A shift counts only from `min_shift` of the baseline's median on, since what is certain may still
not matter. Worse and better are told apart: worse is an alarm, until it is over; better is a note,
and becomes the baseline where it stays.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist, median
from typing import Any

K = 1.0
H = 5.0
#: Samples of the baseline before anything is judged.
MIN_SAMPLES = 50
#: Samples that must look like the baseline again before an alarm ends; their mean score at most.
RECOVERED_SAMPLES = 10
RECOVERED_SCORE = 0.8
#: Samples for which better must stay, to become the baseline.
STAYED_SAMPLES = 100
#: Samples that may wait for the verdict on them before they join the baseline.
MAX_DOUBTFUL = 20
#: Of the lag-1 correlation that is believed.
_MAX_CORRELATION = 0.9
#: A baseline of correlated samples may be so many times as long.
_MAX_GROWTH = 3
#: The shift of a baseline that is 0.
_ENDLESS = 1e9

_NORMAL = NormalDist()


class Finding(enum.StrEnum):
    """What a sample has brought to light."""

    NOTHING = "nothing"
    WORSE = "worse"  # an alarm begins
    RECOVERED = "recovered"  # it ends
    BETTER = "better"  # noted
    REBASED = "rebased"  # what was better is the baseline now


@dataclass(slots=True)
class _Cusum:
    """One side's sum, and the samples since it last was 0."""

    total: float = 0.0
    since: deque[float] = field(default_factory=lambda: deque(maxlen=50))

    def push(self, score: float, value: float, limit: float) -> None:
        self.total = max(0.0, self.total + score - K)
        if self.total:
            self.since.append(value)
        else:
            self.since.clear()
        self.total = min(self.total, 2 * limit)

    def reset(self) -> None:
        self.total = 0.0
        self.since.clear()


class Detector:
    """Judges the samples of one series.

    Args:
        higher_is_worse: direction.
        min_shift: smallest part of the baseline's median that is a shift.
        baseline_samples: the baseline grows up to so many, and is kept then.

    Attributes:
        alarmed: an alarm has begun and not ended.
        shift: of the last finding, as a part of the baseline's median; positive is larger.
        num_samples: pushed in all.
    """

    def __init__(
        self, *, higher_is_worse: bool, min_shift: float = 0.03, baseline_samples: int = 500
    ) -> None:
        self._sign = 1.0 if higher_is_worse else -1.0
        self._min_shift = min_shift
        self._size = max(baseline_samples, MIN_SAMPLES)
        self.alarmed = False
        self.shift = 0.0
        self.num_samples = 0
        self._baseline: list[float] = []  # in the order in which they came
        self._learn([])
        self._doubtful: list[float] = []
        self._worse, self._better = _Cusum(), _Cusum()
        self._last: deque[tuple[float, float]] = deque(maxlen=RECOVERED_SAMPLES)
        self._candidate: list[float] | None = None

    @property
    def center(self) -> float:
        """The baseline's median; NaN before there is one."""
        return self._center if self.is_ready else math.nan

    @property
    def is_ready(self) -> bool:
        """Whether the baseline suffices to judge by."""
        return len(self._baseline) >= MIN_SAMPLES

    @property
    def baseline(self) -> Sequence[float]:
        """Its samples, oldest first."""
        return self._baseline

    def push(self, value: float) -> Finding:
        """Takes the next sample; what is no finite number is no sample."""
        if not math.isfinite(value):
            return Finding.NOTHING
        self.num_samples += 1
        if not self.is_ready:
            self._learn([*self._baseline, value])
            return Finding.NOTHING
        score = self._sign * self.score(value)
        self._worse.push(score, value, self._limit)
        self._better.push(-score, value, self._limit)
        self._last.append((score, value))
        if self.alarmed:
            return self._recovered()
        if self._crossed(self._worse):
            self.alarmed = True
            self._last.clear()
            self._doubtful.clear()
            self._candidate = None
            return Finding.WORSE
        found = self._improved(value)
        if found is Finding.NOTHING and self._candidate is None:
            self._admit(value)
        return found

    def score(self, value: float) -> float:
        """Normal score of a sample by its middle rank in the baseline; positive is larger."""
        low = bisect.bisect_left(self._sorted, value)
        high = bisect.bisect_right(self._sorted, value)
        return _NORMAL.inv_cdf((0.5 * (low + high) + 0.5) / (len(self._sorted) + 1))

    def dismiss(self) -> None:
        """An alarm is over, for want of anything to judge it by."""
        self.alarmed = False
        self._worse.reset()
        self._last.clear()

    def state(self) -> dict[str, Any]:
        """What outlives the process."""
        return {"baseline": self._baseline, "alarmed": self.alarmed, "shift": self.shift}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`; raises ValueError, TypeError or KeyError where it is none."""
        values = [float(value) for value in state["baseline"]]
        if not all(map(math.isfinite, values)):
            raise ValueError("a baseline holds finite numbers")
        self._rebase(values[-_MAX_GROWTH * self._size :])
        self.alarmed = bool(state["alarmed"]) and self.is_ready
        self.shift = float(state["shift"])

    # ------------------------------------------------------------------ shifts

    def _crossed(self, side: _Cusum) -> bool:
        if side.total <= self._limit:
            return False
        shift = self._relative(median(side.since))
        if abs(shift) < self._min_shift:
            return False
        self.shift = shift
        return True

    def _recovered(self) -> Finding:
        if len(self._last) < RECOVERED_SAMPLES:
            return Finding.NOTHING
        score = math.fsum(score for score, _ in self._last) / len(self._last)
        shift = self._relative(median(value for _, value in self._last))
        if score > RECOVERED_SCORE and self._sign * shift >= self._min_shift:
            self.shift = shift
            return Finding.NOTHING
        self.alarmed = False
        self.shift = shift
        self._worse.reset()
        return Finding.RECOVERED

    def _improved(self, value: float) -> Finding:
        """Better is noted at once, and is the baseline once it has stayed."""
        if self._candidate is None:
            if not self._crossed(self._better):
                return Finding.NOTHING
            self._candidate = list(self._better.since)
            self._doubtful.clear()
            return Finding.BETTER
        self._candidate.append(value)
        if len(self._candidate) < min(self._size, STAYED_SAMPLES):
            return Finding.NOTHING
        candidate, self._candidate = self._candidate, None
        shift = self._relative(median(candidate[len(candidate) // 2 :]))
        self._better.reset()
        if self._sign * shift > -self._min_shift:
            return Finding.NOTHING  # it was for a while only
        self.shift = shift
        self._rebase(candidate)
        return Finding.REBASED

    def _relative(self, value: float) -> float:
        """By how much a value differs from the baseline, as a part of it."""
        if self._center == 0.0:
            return 0.0 if value == 0.0 else math.copysign(_ENDLESS, value)
        return (value - self._center) / abs(self._center)

    # ------------------------------------------------------------------ the baseline

    def _admit(self, value: float) -> None:
        """A sample joins the baseline, as long as that grows, once nothing is suspected of it."""
        if len(self._baseline) >= self._full:
            return
        self._doubtful.append(value)
        # A large baseline changes little by one sample, and sorting it takes its time.
        few = len(self._doubtful) < len(self._baseline) // 50
        suspected = self._worse.total > 0.0 and len(self._doubtful) <= MAX_DOUBTFUL
        if not few and not suspected:
            self._learn([*self._baseline, *self._doubtful][: self._full])
            self._doubtful.clear()

    def _rebase(self, values: list[float]) -> None:
        self._worse.reset()
        self._better.reset()
        self._learn(values)

    def _learn(self, values: list[float]) -> None:
        self._baseline = values
        self._sorted = sorted(values)
        self._center = median(values) if values else math.nan
        correlation = _correlation([self.score(value) for value in values])
        inflation = (1 + correlation) / (1 - correlation)
        self._limit = H * inflation
        self._full = round(self._size * min(inflation, _MAX_GROWTH))


def _correlation(scores: Sequence[float]) -> float:
    """Lag-1 correlation, rather too large than too small; 0 where it may be chance."""
    if len(scores) < MIN_SAMPLES:
        return 0.0
    power = math.fsum(score * score for score in scores)
    if power == 0.0:
        return 0.0
    correlation = math.fsum(a * b for a, b in pairwise(scores)) / power
    error = len(scores) ** -0.5
    return min(_MAX_CORRELATION, correlation + error) if correlation > 2.5 * error else 0.0
