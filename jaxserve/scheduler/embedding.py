"""Which texts the next embedding step takes: the second kind of step's queue.

A text waits as sequences that generate do: in the same queue (`queue.WaitingQueue`: priorities,
fair shares, the longest wait), under the same bounds, pushed out for the same reasons
(`shedding`). It runs once, holds no row and no page, and is done. Tenants have counters of their
own here: generation's bound of fairness is one of generated service, and stays as it is proven.

Invariants: `take` gives the best text that waits, then the next best, until one does not fit; so
none is overtaken for its length. Every text let in is taken, cancelled or shed exactly once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from jaxserve.config import SchedulerConfig
from jaxserve.errors import Overloaded
from jaxserve.scheduler.accounts import Accounts, Meter
from jaxserve.scheduler.pages import PageTable
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.scheduler.shedding import Shedding
from jaxserve.types import EmbeddingParams, FinishReason, SamplingParams

#: See `group_size`; more than a step holds would gain nothing.
MAX_GROUP = 256

_NO_SAMPLING = SamplingParams(max_tokens=1, seed=0)


def _no_pages() -> PageTable:
    return PageTable(pages=[], num_behind=[])


@dataclass(slots=True, eq=False, kw_only=True)
class Text(Sequence):
    """A text to embed.

    Attributes:
        params: how its vector is made.
        second_start: of a pair, where its second text begins.
    """

    params: EmbeddingParams
    second_start: int
    sampling: SamplingParams = _NO_SAMPLING
    stop_token_ids: frozenset[int] = frozenset()
    table: PageTable = field(default_factory=_no_pages)


def group_size(config: SchedulerConfig) -> int:
    """Texts that a client should send together: a few clients at once find room in the queue."""
    return min(MAX_GROUP, max(1, (config.max_waiting + config.max_rows) // 4))


class EmbeddingQueue:
    """See the module.

    Args:
        config: of the scheduler; its bounds, prices and fairness hold here too.
        clock_ns: CLOCK_MONOTONIC.
    """

    def __init__(
        self, config: SchedulerConfig, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._config = config
        self._clock_ns = clock_ns
        self._accounts = Accounts(config)
        self._meter = Meter(self._accounts, 0)
        self._waiting = WaitingQueue(config, self._accounts, self._meter, clock_ns=clock_ns)
        self._shedding = Shedding(config, self._waiting)
        self._num_arrived = 0

    @property
    def num_waiting(self) -> int:
        """Texts."""
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Of the texts that wait."""
        return self._waiting.num_tokens

    @property
    def num_shed(self) -> dict[str, int]:
        """Texts that a full queue refused or pushed out so far, by reason."""
        return dict(self._shedding.counts)

    def submit(
        self,
        keys: list[tuple[Hashable, int]],
        texts: Seq[list[int]],
        second_starts: Seq[int],
        params: EmbeddingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        weight: float = 1.0,
        arrived_ns: int = 0,
        request: int = 0,
        again: bool = False,
        queued_ns: int = 0,
    ) -> list[Text]:
        """Lets texts in, one a key.

        Args:
            request: number of theirs in the flight recorder.
            again: they were let in by an engine that ended: no queue is too long for them.
            queued_ns: how long they waited there.

        Raises:
            Overloaded: too many wait, and nobody has to go before these.
            InvalidRequest: they are more than may ever wait.
        """
        account = self._accounts.account(priority, tenant, weight)
        if not again:
            self._shedding.make_way(
                *(len(texts), sum(map(len, texts)), priority, account),
                num_waiting=self.num_waiting,
                num_free_slots=self._config.max_rows,  # the next step takes about as many
                end=self.cancel,
            )
        now_ns = self._clock_ns()
        submitted = []
        for key, token_ids, second_start in zip(keys, texts, second_starts, strict=True):
            self._num_arrived += 1
            text = Text(
                key=key,
                token_ids=token_ids,
                prompt_len=len(token_ids),
                choice=0,
                level=priority,
                arrival=self._num_arrived,
                account=account,
                arrived_ns=arrived_ns,
                queued_ns=now_ns,
                request=request,
                params=params,
                second_start=second_start,
            )
            text.is_charged = again
            text.waited_ns = queued_ns
            self._waiting.push(text)
            submitted.append(text)
        return submitted

    def take(self, add: Callable[[int], bool]) -> list[Text]:
        """The next step's texts, which are launched now.

        Args:
            add: whether the step has room for one more text of such a length, which is in it then.
        """
        self._waiting.refresh()
        now_ns = self._clock_ns()
        taken: list[Text] = []
        while (best := self._waiting.peek()) is not None:
            assert isinstance(best, Text)
            if not add(best.prompt_len):
                break
            self._waiting.pop()
            self._meter.admit(best)
            self._meter.leave(best)
            best.scheduled_ns = now_ns
            best.state = SequenceState.RETIRED
            best.reach(0, best.prompt_len)
            taken.append(best)
        return taken

    def done(self, text: Text) -> bool:
        """A text's vector is here; whether anybody still waits for it."""
        if text.state is SequenceState.FINISHED:
            return False
        text.state, text.reason = SequenceState.FINISHED, FinishReason.STOP
        return True

    def cancel(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a text now, wherever it is; what is launched for it is dropped when it comes."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        sequence.state, sequence.reason = SequenceState.FINISHED, reason

    def take_shed(self) -> list[tuple[Sequence, Overloaded]]:
        """Texts that were ended for newcomers since the last call, and what they are told."""
        return self._shedding.take()
