"""A full queue: who is pushed out for a newcomer, or why the newcomer is refused.

The bounds are on waiting sequences and on their known tokens, beside what the next plans can take
out of the queue. A newcomer of a better priority pushes out whoever came last at the worst; within
a priority, a tenant that would still have fewer waiting than the one with most pushes out the last
of that one's. Only whole requests go, of which no sequence has ever run.

Every refusal and every shed sequence is counted by reason:
    queue_full, queue_tokens: newcomers that were refused.
    priority, fair_share: waiting ones that were pushed out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from jaxserve.config import SchedulerConfig
from jaxserve.errors import InvalidRequest, Overloaded
from jaxserve.scheduler.accounts import Account
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason


class Shedding:
    """See the module.

    Args:
        config: bounds of the queue, and how many run at once.
        waiting: the queue.

    Attributes:
        counts: sequences refused or shed so far, by reason.
    """

    def __init__(self, config: SchedulerConfig, waiting: WaitingQueue) -> None:
        self.counts: Counter[str] = Counter()
        self._config = config
        self._waiting = waiting
        self._ended: list[tuple[Sequence, Overloaded]] = []

    def take(self) -> list[tuple[Sequence, Overloaded]]:
        """Sequences that were ended for newcomers since the last call, and what they are told."""
        ended, self._ended = self._ended, []
        return ended

    def make_way(
        self,
        num_new: int,
        num_tokens: int,
        level: int,
        account: Account,
        *,
        num_waiting: int,
        num_free_slots: int,
        end: Callable[[Sequence, FinishReason], None],
    ) -> None:
        """Makes room in the queue for a request.

        Args:
            num_new, num_tokens: sequences, and tokens of their prompt.
            num_waiting: choices that wait for another's prompt among them.
            end: called with each sequence that must end for it; `take` has them then.

        Raises:
            InvalidRequest: there would be no room even if nobody else were there.
            Overloaded: there is none, and nobody has to go before it.
        """
        config = self._config
        if num_new > config.max_waiting + config.max_rows:
            raise InvalidRequest(
                f"{num_new} sequences are more than may ever run and wait here, "
                f"{config.max_rows} + {config.max_waiting}: lower n, or raise "
                "scheduler.max_waiting",
                param="n",
            )
        over = num_waiting + num_new - config.max_waiting - num_free_slots
        over_tokens = 0
        if config.max_waiting_tokens and num_waiting >= num_free_slots:
            over_tokens = self._waiting.num_tokens + num_tokens - config.max_waiting_tokens
        if over <= 0 and over_tokens <= 0:
            return
        # Taken out of the queue to see who would be next; put back if it is not enough.
        pushed_out: list[Sequence] = []
        freed, freed_tokens = 0, 0
        while freed < over or freed_tokens < over_tokens:
            worst = self._waiting.to_shed(level, account)
            if worst is None:
                break
            freed += 1 + len(worst.followers)
            freed_tokens += len(worst.token_ids)
            self._waiting.remove(worst)
            pushed_out.append(worst)
        for sequence in reversed(pushed_out):
            self._waiting.push(sequence, lift=False)
        if freed >= over and freed_tokens >= over_tokens:
            for sequence in pushed_out:
                verdict = self._verdict(sequence, level)
                for choice in [*sequence.followers, sequence]:
                    end(choice, FinishReason.ERROR)
                    self._ended.append((choice, verdict))
            return
        if over > 0:
            self.counts["queue_full"] += num_new
            raise Overloaded(
                f"{num_waiting} sequences wait and {num_new} more came, the limit is "
                f"{config.max_waiting}; try again later, or raise scheduler.max_waiting"
            )
        self.counts["queue_tokens"] += num_new
        raise Overloaded(
            f"sequences of {self._waiting.num_tokens} tokens wait and {num_tokens} more came, the "
            f"limit is {config.max_waiting_tokens}; try again later, or raise "
            "scheduler.max_waiting_tokens"
        )

    def _verdict(self, sequence: Sequence, level: int) -> Overloaded:
        by_priority = sequence.level > level
        reason = "priority" if by_priority else "fair_share"
        self.counts[reason] += 1 + len(sequence.followers)
        why = "a request of better priority" if by_priority else "a tenant with fewer waiting"
        return Overloaded(
            f"the queue is full and {why} took the place of this request, which came last of "
            "those that could go; try again later"
        )
