"""Requests that are suspected of killing the engine run in groups, apart from each other.

After a second death in which the same requests were in the dying step, the supervisor starts the
engine with *trials*: groups of request keys (`http.suspects` makes them). One group at a time is
let in. Its trial is over when none of them waits for an adapter or a grammar, and each sequence has
ended, or has come `tokens` further than where its client left off. During the first trial nobody
else runs, so that the death of a group of one is that request's doing; later trials run beside what
has stood its own, and everybody else, with the best priority of those that wait for them.

Requests wait here as messages, before the scheduler and even the check of them sees them. Without
trials, which is always but after such deaths, nothing is held.

Invariant: what is held is let in after `ARRIVAL_S` and the trials before it, or its client ends it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from collections.abc import Sequence as Seq

from jaxserve.engine.check import request_number
from jaxserve.engine.held import HeldRequests
from jaxserve.engine.recorder import Recorder
from jaxserve.errors import RequestQuarantined
from jaxserve.protocol.messages import Embed, Finished, Submit
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason

#: How long a trial waits for requests of its group, which their clients may have given up.
ARRIVAL_S = 3.0


class Probation:
    """Which requests may run now.

    Args:
        trials: groups of request keys, in order.
        quarantined: keys of requests that are not run any more.
        tokens: how much further than before a sequence must come: more than what may be launched
            and unread.
        recorder: told who is on trial.
        clock_s: monotonic.
    """

    def __init__(
        self,
        trials: Seq[Collection[str]],
        quarantined: Collection[str],
        tokens: int,
        recorder: Recorder,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trials = [set(trial) for trial in trials]
        self._suspects = set().union(*self._trials)
        self._quarantined = frozenset(quarantined)
        self._tokens = tokens
        self._recorder = recorder
        self._clock_s = clock_s
        self._held: HeldRequests[Submit | Embed] = HeldRequests("held")
        self._trial = 0  # index of the one that is on or comes next
        self._let_in = False  # whether its requests were
        self._watched: list[tuple[Sequence, int]] = []  # sequences on trial, length to come to
        self._deadline_s: float | None = None  # when it begins without those that have not come

    @property
    def num_held(self) -> int:
        """Sequences that wait here."""
        return self._held.num_sequences

    def check(self, message: Submit | Embed) -> None:
        """Refuses what is quarantined.

        Raises:
            RequestQuarantined: it is.
        """
        if message.request_key in self._quarantined:
            raise RequestQuarantined(
                "the engine process ended each time it ran this request, at last with this one "
                "alone; the others go on without it. Do not send it again as it is"
            )

    def holds(self, client: Hashable, message: Submit | Embed) -> bool:
        """Whether a request has to wait; it is kept then."""
        if self._trial == len(self._trials) and message.request_key not in self._suspects:
            return False
        if self._trial == len(self._trials):  # its own trial is over: it comes late
            self._trials.append({message.request_key})
        elif self._trial > 0 and message.request_key not in self._suspects:
            return False  # beside a later trial everybody else runs
        self._held.add(client, message)
        return True

    def release(
        self, waits: Callable[[Collection[str]], bool]
    ) -> list[tuple[Hashable, Submit | Embed]]:
        """What may run from now on; called each turn of the loop.

        Args:
            waits: whether one of these requests, let in here, has to wait for something else.
        """
        if self._trial == len(self._trials):
            return []
        if not self._let_in:
            return self._begin_trial()
        if waits(self._trials[self._trial]):
            return []
        if not all(_stands(sequence, length) for sequence, length in self._watched):
            return []
        return self._end_trial()

    def watch(self, message: Submit | Embed, sequences: Seq[Sequence]) -> None:
        """A request was let in as these sequences."""
        if self._trial < len(self._trials) and message.request_key in self._trials[self._trial]:
            self._watched += [(s, len(s.token_ids) + self._tokens) for s in sequences]

    def withdraw(
        self, client: Hashable, sequence_ids: Collection[int], reason: FinishReason
    ) -> list[Finished]:
        """A client cancels these: the ends of those of them that wait here."""
        return [end for _, end in self._held.withdraw(client, sequence_ids, reason)]

    def forget(self, client: Hashable) -> None:
        """A client is gone."""
        self._held.forget(client)

    def _begin_trial(self) -> list[tuple[Hashable, Submit | Embed]]:
        """Lets the group in, once it is complete or has been waited for."""
        group = self._trials[self._trial]
        now_s = self._clock_s()
        if self._deadline_s is None:
            self._deadline_s = now_s + ARRIVAL_S
        here = {message.request_key for _, message in self._held}
        if not group <= here and now_s < self._deadline_s:
            return []
        if self._trial > 0:  # those that come late to an earlier trial
            late = set().union(*self._trials[: self._trial]) & here
            group |= late
        released = self._held.take(lambda message: message.request_key in group)
        if not released:
            return self._end_trial()
        self._recorder.trying(map(request_number, group), self._trial)
        self._let_in = True
        return released if self._trial == 0 else [*self._raised(released)]

    def _raised(
        self, released: list[tuple[Hashable, Submit | Embed]]
    ) -> Iterator[tuple[Hashable, Submit | Embed]]:
        """With the best priority of those that wait for their trial to end, where that is better.

        All others run beside it: behind those its requests might never come to their tokens.
        """
        held = [message.priority for _, message in self._held]
        for client, message in released:
            best = min([message.priority, *held])
            yield client, dataclasses.replace(message, priority=best)

    def _end_trial(self) -> list[tuple[Hashable, Submit | Embed]]:
        """It is over; after the first one everybody else may run."""
        self._trial += 1
        self._let_in = False
        self._watched = []
        self._deadline_s = None
        self._recorder.trying((), self._trial)
        return self._held.take(lambda message: message.request_key not in self._suspects)


def _stands(sequence: Sequence, length: int) -> bool:
    return sequence.reason is not None or len(sequence.token_ids) >= length
