"""Which requests may be what kills the engine, judged by what its flight recorder says after death.

    first death    everybody in the dying steps is noted; all are replayed at once
    second death   who was noted before and is in the dying steps again is a suspect: suspects are
                   replayed in trials, one group after another (engine.probation)
    death in a     the group that was on trial is split and its parts go first; if it was one
    trial          request, and nothing else was in the dying steps, that one is quarantined

So a crowd that somebody kills from outside, however often, loses nobody: only who kills the engine
alone, after two deaths that it shared, is not replayed. Groups are split into quarters, two
bisections at once, since each death costs a start of the engine: of 64 requests in the dying steps
the one to blame is found with the sixth death at the latest, or the seventh where its trial was not
the first.

Invariant: a request is in at most one trial, and in none once it is quarantined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from jaxserve.protocol.flight import LastSteps

#: Parts that a suspected group is split into.
PARTS = 4

Trial = tuple[str, ...]


class Suspects:
    """What is known about requests, by key; see the module.

    Attributes:
        trials: that the next engine is to make, in order.
        quarantined: requests that it is to refuse.
    """

    def __init__(self) -> None:
        self.trials: tuple[Trial, ...] = ()
        self.quarantined: tuple[str, ...] = ()
        self._deaths: Counter[str] = Counter()

    def judge(self, last: LastSteps) -> None:
        """The engine has ended in these steps."""
        if not last.serving:
            return  # nobody's doing: it had not come to run anything
        stood = self.trials[: last.trials_done]
        left = self.trials[last.trials_done :]
        for trial in stood:
            for key in trial:
                del self._deaths[key]
        if last.on_trial:
            self.trials = (*self._convict(last, left[0] if left else ()), *left[1:])
        elif left:
            self.trials = left  # it died between two trials
        else:
            self._deaths.update(last.requests)
            self.trials = split([k for k in last.requests if self._deaths[k] > 1])

    def _convict(self, last: LastSteps, trial: Trial) -> tuple[Trial, ...]:
        """The trials to be made in place of the one that the engine died in."""
        guilty = last.requests & last.on_trial
        if not guilty:
            return (trial,) if trial else ()
        others = tuple(sorted(last.on_trial.union(trial) - guilty))  # were not even in the steps
        if len(guilty) == 1 and last.requests == guilty:
            self.quarantined = (*self.quarantined, *guilty)
            parts: tuple[Trial, ...] = ()
        else:
            parts = split(guilty)
        return (*parts, others) if others else parts


def split(keys: Collection[str]) -> tuple[Trial, ...]:
    """Up to `PARTS` groups of about the same size."""
    ordered = sorted(keys)
    num_parts = min(PARTS, len(ordered))
    return tuple(tuple(ordered[part::num_parts]) for part in range(num_parts))
