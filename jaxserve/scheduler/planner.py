"""Makes a plan: which sequences get how many tokens, which slots and which pages, in this step.

Decoding rows come first, a token each. Then sequences whose known tokens are not all computed and
those that wait, better levels first, share the rest of the step's tokens; or rows with drafts,
which no prompt joins. Who is set back in a plan does not come back in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.chunks import chunk_of, drafts_of, join_of
from jaxserve.scheduler.drafting import Drafted
from jaxserve.scheduler.pace import Pacer
from jaxserve.scheduler.phases import Phase, chunk_end, phase_of
from jaxserve.scheduler.plan import PageCopy, Plan
from jaxserve.scheduler.room import Room
from jaxserve.scheduler.rows import Rows
from jaxserve.scheduler.sequence import Sequence, SequenceState, Wait


class Planner:
    """Fills plans for one copy of the model.

    Args:
        rows: its sequences.
        pacer: how much of a step prompts may take.
        clock_ns: CLOCK_MONOTONIC.
    """

    def __init__(
        self, config: SchedulerConfig, rows: Rows, pacer: Pacer, clock_ns: Callable[[], int]
    ) -> None:
        self._max_step_tokens = config.max_step_tokens
        self._rows = rows
        self._pacer = pacer
        self._clock_ns = clock_ns
        self._room = Room(rows.pages, rows.choices, config.max_step_tokens)
        self._planned: set[Sequence] = set()  # have a chunk in the plan that is being made
        self._set_back_level: float = math.inf  # the best one set back in it
        self._retaken: dict[int, int] = {}  # slots of those, as `Plan.forget_entries` has them
        self._phase = Phase.MIXED

    def fill(self, plan: Plan, phase: Phase) -> list[Sequence]:
        """Fills a plan whose decode steps are settled.

        Args:
            phase: what the step may hold.

        Returns:
            The decoding rows that open a page.
        """
        self._planned.clear()
        self._set_back_level = math.inf
        self._retaken.clear()
        self._phase = phase
        self._rows.unpark()
        for sequence in self._rows.meter.over_bound(self._rows.waiting):
            self._preempt(sequence)
        budget = self._max_step_tokens
        opened: list[Sequence] = []
        if phase is Phase.PROMPTS:
            plan.decode_steps = 0
        else:
            opened = self._open_pages(plan)
            # At least one token a row, so this is never negative.
            budget -= len(self._rows.decoding)
            budget = self._pacer.budget(len(self._rows.decoding), budget)
        drafted = self._rows.drafting.take_drafted()
        for row in drafted:
            self._add_drafts(plan, row)
        if not drafted:
            budget = self._continue_prefills(plan, budget)
            self._admit(plan, budget)
        if self._retaken:
            plan.forget_entries(self._retaken)
        return opened

    def _open_pages(self, plan: Plan) -> list[Sequence]:
        """Gives decoding rows that come to a new page one, preempting the worst if need be.

        Returns:
            These rows.
        """
        rows, ahead = self._rows, self._rows.ahead
        opened = rows.decoding.opened_by(plan.decode_steps)
        if plan.decode_steps == 1 and all(sequence in ahead for sequence in opened):
            return opened
        opening = rows.decoding.opening(plan.decode_steps)
        entries = rows.pages.open_each(opening)
        if entries is not None:
            plan.page_entries += entries
            return opened
        for sequence, position in opening:
            while sequence.state is SequenceState.DECODING:
                # What a window has passed is given back as of the call's first step: the pages
                # may go to rows of this very call.
                first = self._rows.decoding.position(sequence)
                entries = self._rows.pages.extend(sequence.table, first, position + 1)
                if entries is not None:
                    plan.enter(sequence.slot, entries)
                    break
                self._make_room(None)
        return opened

    def _continue_prefills(self, plan: Plan, budget: int) -> int:
        """Chunks for sequences that hold a slot; returns the budget that is left."""
        for sequence in sorted(self._rows.prefilling, key=_rank):
            budget = self._admit(plan, budget, sequence.level)
            if budget == 0:
                continue
            if sequence.state is not SequenceState.PREFILLING:
                continue  # preempted for a better one, just now
            plan.enter(sequence.slot, self._rows.prefix.catch_up(sequence))
            self._rows.meter.found(sequence, sequence.count_found())
            end = chunk_end(self._phase, sequence, budget)
            if end == sequence.num_computed:
                continue  # in a step of another kind
            entries = self._rows.pages.extend(sequence.table, sequence.num_computed, end)
            while entries is None and self._make_room(sequence):
                entries = self._rows.pages.extend(sequence.table, sequence.num_computed, end)
            if entries is None:
                end = min(end, self._rows.pages.reachable(sequence.table, sequence.num_computed))
                if end <= sequence.num_computed or self._phase is Phase.PROMPTS:
                    continue  # the worst-ranked of all, and no page is free: it waits a step
                entries = self._rows.pages.extend(sequence.table, sequence.num_computed, end)
                assert entries is not None
            plan.enter(sequence.slot, entries)
            budget = self._left(budget, self._add_chunk(plan, sequence, end))
        return budget

    def _admit(self, plan: Plan, budget: int, above: float = math.inf) -> int:
        """Lets waiting sequences take slots, in the queue's order without exception.

        Args:
            above: only of better levels than this.

        Returns:
            The budget that is left.
        """
        rows = self._rows
        waiting, slots, pages = rows.waiting, rows.slots, rows.pages
        is_mixed = self._phase is Phase.MIXED
        while True:
            level = waiting.best_level
            # Who was preempted in this plan, and who stands behind it, would come right back.
            if level is None or level >= above or level >= self._set_back_level:
                return budget
            if not (budget and slots.num_free) and slots.worst_level <= level:
                return budget
            sequence = waiting.peek()
            if sequence is None or sequence.has_unread:
                return budget  # preempted a moment ago: its last tokens are still on their way
            if not rows.adapters.may_join(sequence):
                sequence.waits.append(Wait("adapter", self._clock_ns()))
                rows.park(sequence)
                continue
            if rows.prefix.find(sequence):
                rows.choices.hold(sequence)
            if not is_mixed and phase_of(sequence) is not self._phase:
                return budget  # its turn comes with a step of another kind
            if not slots.num_free or not self._room.is_for(sequence, slots.num_taken):
                victims = self._room.victims(sequence, slots, self._planned)
                gained = sum(victim.state is SequenceState.DECODING for victim in victims)
                gained *= min(plan.decode_steps, 1)
                if not victims or budget + gained == 0:
                    return budget
                for victim in victims:
                    self._preempt(victim)
                budget += gained
                if not self._room.is_for(sequence, slots.num_taken):
                    return budget
            if budget == 0:
                return budget
            end = chunk_end(self._phase, sequence, budget)
            # Where nothing is computed, there is no page yet.
            copies = (
                pages.own(sequence.table, sequence.num_computed) if sequence.num_computed else []
            )
            if copies is None:
                if not slots.num_taken and rows.choices.reclaim(sequence):
                    continue
                return budget
            if not pages.grow(sequence.table, sequence.num_computed, end):
                # Alone, and a window group holds only a part of the budget.
                end = min(end, pages.reachable(sequence.table, sequence.num_computed))
                has_grown = pages.grow(sequence.table, sequence.num_computed, end)
                assert has_grown and end > sequence.num_computed
            waiting.pop()
            rows.choices.leaves_queue(sequence)
            self._take_slot(plan, sequence)
            if copies:
                plan.page_copies += [PageCopy(group=g, source=s, target=t) for g, s, t in copies]
            rows.swap.restore(plan, sequence)
            plan.page_entries += pages.entries(sequence.table, sequence.slot)
            budget = self._left(budget, self._add_chunk(plan, sequence, end))

    def _left(self, budget: int, used: int) -> int:
        """The step's tokens that are left; a step of a prompt holds no second chunk."""
        return 0 if self._phase is Phase.PROMPTS else budget - used

    def _add_chunk(self, plan: Plan, sequence: Sequence, end: int) -> int:
        """Plans the known tokens up to `end`; returns how many."""
        start = sequence.num_computed
        plan.chunks.append(chunk_of(sequence, end, again=self._phase is Phase.PROMPTS))
        self._planned.add(sequence)
        sequence.reach(start, end)
        if end == len(sequence.token_ids):
            sequence.num_planned = sequence.num_outputs + 1
            self._rows.meter.sampled(sequence)
        if sequence.followers and end >= sequence.prompt_len:
            self._rows.choices.fork(sequence)
        return end - start

    def _add_drafts(self, plan: Plan, drafted: Drafted) -> None:
        """Plans the last known token of a row, and drafts of what follows."""
        sequence, draft, entries = drafted
        start = sequence.num_computed
        plan.enter(sequence.slot, entries)
        plan.chunks.append(drafts_of(sequence, draft))
        self._planned.add(sequence)
        sequence.reach(start, start + 1)
        sequence.num_planned = sequence.num_outputs + 1 + len(draft)
        sequence.num_drafted += len(draft)

    def _take_slot(self, plan: Plan, sequence: Sequence) -> None:
        self._rows.meter.found(sequence, sequence.count_found())
        self._rows.slots.take(sequence)
        self._rows.adapters.join(sequence)
        self._rows.prefix.joined(sequence)
        if self._set_back_level < math.inf:
            self._retaken[sequence.slot] = len(plan.page_entries)
        sequence.state = SequenceState.PREFILLING
        sequence.has_begun = True
        sequence.scheduled_ns = sequence.scheduled_ns or self._clock_ns()
        if sequence.waits:
            sequence.end_waits(self._clock_ns())
        self._rows.prefilling[sequence] = None
        plan.joins.append(join_of(sequence))

    def _make_room(self, needy: Sequence | None) -> bool:
        """Frees some pages: those that waiting sequences hold, else the worst running row's.

        Args:
            needy: only sequences of worse rank than this may be preempted; None: any.
        """
        if self._rows.choices.reclaim():
            return True
        victim = next(self._rows.slots.worst_first(self._planned), None)
        if victim is None or (needy is not None and victim.rank <= needy.rank):
            return False
        self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._rows.set_back(sequence)
        kind = "preempted" if sequence.host_table is None else "swapped"
        sequence.waits.append(Wait(kind, self._clock_ns()))
        self._set_back_level = min(self._set_back_level, sequence.level)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
