"""The decoding rows: who decodes, who needs a page next, whose last token is next.

Every decoding row brings one token a decode step, so nobody has to be visited for going on. The
set keeps a clock that counts decode steps, of all plans; a row's next position is its base plus
the clock. Two calendars by clock then name the only rows that a plan must visit: those whose next
position opens a page (buckets by clock modulo page size) and those that are done.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxserve.scheduler.accounts import Meter
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.sequence import Sequence, SequenceState


class DecodeSet:
    """Sequences in state DECODING, in the order they joined.

    Args:
        page_size: tokens a page.
        meter: charges tenants for them.

    Attributes:
        clock: decode steps launched so far.
        num_constrained: members that a grammar holds, which the host has to see after each step.
    """

    def __init__(self, page_size: int, meter: Meter) -> None:
        self.clock = 0
        self.num_constrained = 0
        self._meter = meter
        self._page_size = page_size
        self._members: dict[Sequence, None] = {}
        self._opening: list[dict[Sequence, None]] = [{} for _ in range(page_size)]
        self._ending: dict[int, dict[Sequence, None]] = {}
        self._joins: dict[Sequence, None] = {}
        self._leaves: list[int] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def position(self, sequence: Sequence) -> int:
        """The position that a member's next decode step computes."""
        return sequence.decode_base + self.clock

    def num_unread(self, sequence: Sequence) -> int:
        """A member's tokens that are launched and not read."""
        return self.position(sequence) + 1 - len(sequence.token_ids)

    def add(self, sequence: Sequence) -> None:
        """A sequence joins whose next input is the token sampled last, read back or not."""
        sequence.state = SequenceState.DECODING
        sequence.decode_base = sequence.num_computed - self.clock
        sequence.end_clock = self.clock + sequence.sampling.max_tokens - sequence.num_planned
        self._members[sequence] = None
        self.num_constrained += sequence.sampling.grammar is not None
        self._opening[-sequence.decode_base % self._page_size][sequence] = None
        self._ending.setdefault(sequence.end_clock, {})[sequence] = None
        self._joins[sequence] = None
        self._meter.begin(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A member leaves; its counts are brought up to what has been launched."""
        self._meter.end(sequence)
        del self._members[sequence]
        self.num_constrained -= sequence.sampling.grammar is not None
        del self._opening[-sequence.decode_base % self._page_size][sequence]
        ending = self._ending[sequence.end_clock]
        del ending[sequence]
        if not ending:
            del self._ending[sequence.end_clock]
        if sequence in self._joins:
            del self._joins[sequence]  # the device side never heard of it
        else:
            self._leaves.append(sequence.slot)
        position = self.position(sequence)
        sequence.reach(sequence.num_computed, position)
        sequence.num_planned = position - sequence.prompt_len + 1

    def done(self) -> list[Sequence]:
        """Members whose last token has been launched."""
        return list(self._ending.get(self.clock, ()))

    def any_done_within(self, num_steps: int) -> bool:
        """Whether a member's last token comes before the last of the next `num_steps` steps."""
        return any(self.clock + step in self._ending for step in range(1, num_steps))

    def opening(self, num_steps: int) -> list[tuple[Sequence, int]]:
        """(member, position) of each page opened in the next decode steps, in their order."""
        return [
            (sequence, sequence.decode_base + clock)
            for clock in range(self.clock, self.clock + num_steps)
            for sequence in self._opening[clock % self._page_size]
        ]

    def opened_by(self, num_steps: int) -> list[Sequence]:
        """The members of `opening`, without a look at them."""
        size = self._page_size
        return [s for n in range(num_steps) for s in self._opening[(self.clock + n) % size]]

    def tell(self, plan: Plan) -> None:
        """Moves who joined and left since the last plan into this one, and advances the clock."""
        plan.decode_joins = [sequence.slot for sequence in self._joins]
        plan.decode_starts = [sequence.num_computed for sequence in self._joins]
        plan.decode_leaves = self._leaves
        self._joins = {}
        self._leaves = []
        self.clock += plan.decode_steps
        self._meter.clock = self.clock
