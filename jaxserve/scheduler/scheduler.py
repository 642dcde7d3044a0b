"""The scheduler: each step, which sequences get how many tokens, which slots and which pages.

`plan()` says what the next device call does, `commit()` takes in what an earlier one sampled. The
engine's loop calls them so that plan n + 1 is made before the tokens of plan n are read; what that
delay means is written in `engine.loop`. Integers only: no arrays, no device.

One budget, no phases: decoding rows bring a token each, the rest of `max_step_tokens` goes to
sequences whose known tokens are not all computed and to those that wait, better levels first.
Those that wait are let in in the queue's order (`scheduler.queue`); one of a better level takes
slots and pages from worse ones (`scheduler.room`), but only if they are enough to run it at once.

Invariants: a sequence of better rank is never preempted for one of worse rank, and what fits the
pool alone is let in, so the best always comes to its end; the one exception are rows whose tenant
is at the bound of fairness (`scheduler.accounts`). Who is preempted does not come back in the same
plan. Only rows that join, leave, open a page or end are visited by `plan`; how many wait makes no
difference. A decoding row's full page becomes findable (`scheduler.prefix`) when the step that
opens its next one is read, so that nobody is visited for it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.accounts import Accounts, Meter
from jaxserve.scheduler.admission import check_cache, check_context
from jaxserve.scheduler.choices import Choices
from jaxserve.scheduler.chunks import chunk_of, drafts_of, join_of
from jaxserve.scheduler.commit import Commit, Launched
from jaxserve.scheduler.decoding import DecodeSet
from jaxserve.scheduler.drafting import Drafted, DraftSet
from jaxserve.scheduler.host_pages import HostPages
from jaxserve.scheduler.pace import Pacer
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.phases import Phase, chunk_end, phase_of
from jaxserve.scheduler.plan import PageCopy, Plan
from jaxserve.scheduler.prefix import PrefixCache
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.room import Room, worst_first
from jaxserve.scheduler.sequence import Resumed, Sequence, SequenceState
from jaxserve.scheduler.shedding import Shedding
from jaxserve.scheduler.slots import SlotTable
from jaxserve.scheduler.spill import Spill
from jaxserve.scheduler.swap import Swap
from jaxserve.types import FinishReason, ModelInfo, SamplingParams


class Scheduler:
    """Decides what runs; see the module.

    Args:
        config: budgets.
        model: its context, end tokens and cache groups.
        page_size: tokens a page.
        num_pages: pages of each cache group's pool, page 0 included.
        cache: whether pages stay findable, and for whom; its defaults where None.
        accounts: the tenants' counters, shared with other copies' schedulers; own ones where None.
        pacer: likewise.
        cached_tokens: how many of a waiting sequence's known tokens need not be computed; what the
            prefix cache says where None.
        host_pages: pages of each group on the host; none where preempted sequences are recomputed.
        preemption: as `CacheConfig.preemption`.
        clock_ns: CLOCK_MONOTONIC.

    Attributes:
        pages: the allocator.
        prefix: the cache of pages by content.
        shedding: of the queue; counts who was refused or shed.
        swap: what preempted sequences have on the host.
        num_preemptions: so far.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        model: ModelInfo,
        *,
        page_size: int,
        num_pages: Iterable[int],
        cache: CacheConfig | None = None,
        accounts: Accounts | None = None,
        pacer: Pacer | None = None,
        cached_tokens: Callable[[Sequence], int] | None = None,
        host_pages: Iterable[int] = (),
        preemption: str = "auto",
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.pages = PageAllocator(page_size, model.cache_groups, list(num_pages))
        host = HostPages(list(host_pages))
        self.swap = Swap(self.pages, host, preemption)
        self._spill = Spill(self.pages, host)
        self.prefix = PrefixCache(
            self.pages, self._spill, self.swap.costs, cache or CacheConfig(), model.name
        )
        self.num_preemptions = 0
        self._config = config
        self._model = model
        self._clock_ns = clock_ns
        self._accounts = accounts or Accounts(config)
        self._pacer = pacer or Pacer(config.max_step_ms, config.max_step_tokens)
        self._meter = Meter(self._accounts, self.pages.capacity_tokens)
        self._waiting = WaitingQueue(
            config,
            self._accounts,
            self._meter,
            cached_tokens=cached_tokens or self.prefix.num_cached_of,
            clock_ns=clock_ns,
        )
        self.shedding = Shedding(config, self._waiting)
        self._choices = Choices(self.pages, self._waiting)
        self._room = Room(self.pages, self._choices, config.max_step_tokens)
        self._prefilling: dict[Sequence, None] = {}
        self._decoding = DecodeSet(page_size, self._meter)
        self._drafting = DraftSet(config, self._decoding, self.pages)
        self._slots = SlotTable(config.max_rows, self._meter)
        self._planned: set[Sequence] = set()  # have a chunk in the plan that is being made
        self._set_back_level: float = math.inf  # the best one preempted in it
        self._launched: deque[Launched] = deque()
        self._phase = Phase.MIXED
        self._next_step_id = 0
        self._num_arrived = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no slot and have not ended."""
        return len(self._waiting) + self._choices.num_held

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefilling) + len(self._decoding) + len(self._drafting)

    def running(self) -> list[Sequence]:
        """The sequences that hold a slot."""
        return [*self._decoding, *self._drafting, *self._prefilling]

    @property
    def has_work(self) -> bool:
        """Whether anything runs, waits, or is launched and not committed."""
        return bool(self.num_running or self.num_waiting or self._launched)

    # ------------------------------------------------------------------ from and to the engine

    def submit(
        self,
        keys: list[tuple[Hashable, int]],
        prompt: list[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        weight: float = 1.0,
        arrived_ns: int = 0,
        request: int = 0,
        resumed: Resumed | None = None,
    ) -> list[Sequence]:
        """Lets a request in: one sequence a key, in choice order, all over one prompt.

        Those that must leave a full queue for it are what `shedding.take` gives then.

        Args:
            priority: smaller is served first, and preempts.
            tenant, weight: who is charged, and its share beside others'.
            cache_salt: only requests with the same one (and of the same tenant, unless
                `cache.isolation` is "none") share cached pages.
            request: its number in the flight recorder.
            resumed: how far an engine that ended had come with it, which had let it in: no queue
                is too long for it, and its tenant has been charged.

        Raises:
            ContextTooLong: prompt and max_tokens exceed the model's context.
            OutOfPages: they exceed the page pool even when nothing else runs.
            Overloaded: too many wait.
        """
        check_context(len(prompt), sampling.max_tokens, self._model.max_context)
        check_cache(len(prompt), sampling.max_tokens, self.pages)
        account = self._accounts.account(priority, tenant, weight)
        if resumed is None:
            self.shedding.make_way(
                *(len(keys), len(prompt), priority, account),
                num_waiting=self.num_waiting,
                num_free_slots=self._slots.num_free,
                end=self.cancel,
            )
        stops = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops |= frozenset(self._model.eos_token_ids)
        root = self.prefix.root(tenant, cache_salt)
        sequences = []
        choices = range(len(keys)) if resumed is None else resumed.choices
        for choice, key in zip(choices, keys, strict=True):
            self._num_arrived += 1
            sequences.append(
                Sequence(
                    key=key,
                    token_ids=list(prompt),
                    prompt_len=len(prompt),
                    sampling=sampling,
                    choice=choice,
                    level=priority,
                    arrival=self._num_arrived,
                    stop_token_ids=stops,
                    table=self.pages.new_table(),
                    account=account,
                    arrived_ns=arrived_ns,
                    root=root,
                    queued_ns=self._clock_ns(),
                    request=request,
                )
            )
        if resumed is not None:
            for sequence, emitted in zip(sequences, resumed.emitted, strict=True):
                sequence.resume(emitted, resumed.num_prompt_logprobs)
        self._choices.lead(sequences)
        return sequences

    def cancel(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence now, wherever it is; what is launched for it is discarded when read."""
        if sequence.reason is None:
            sequence.reason = reason
            self._end(sequence)

    def phases(self) -> set[Phase]:
        """The kinds of step that there is work for, where they take turns."""
        found = {phase_of(sequence) for sequence in self._prefilling}
        if len(self._decoding):
            found.add(Phase.OUTPUTS)
        waiting = self._waiting.peek()
        if waiting is not None:
            found.add(phase_of(waiting))
        return found

    def plan(self, max_decode_steps: int | None = None, phase: Phase = Phase.MIXED) -> Plan | None:
        """The next device call; None if there is nothing to launch.

        Args:
            max_decode_steps: in one call. None where there is no other copy of the model: it is
                then what `decode_steps` says, and what comes before, `regroup`, is done too.
            phase: what the step may hold.
        """
        if max_decode_steps is None:
            self.regroup(self.may_draft)
        plan = Plan(step_id=self._next_step_id)
        self._planned.clear()
        self._set_back_level = math.inf
        self._waiting.refresh()
        plan.decode_steps = self.decode_steps()
        if max_decode_steps is not None:
            plan.decode_steps = min(plan.decode_steps, max_decode_steps)
        for sequence in self._meter.over_bound(self._waiting):
            self._preempt(sequence)
        self._phase = phase
        budget = self._config.max_step_tokens
        if phase is Phase.PROMPTS:
            plan.decode_steps = 0
            opened = []
        else:
            opened = self._open_pages(plan)
            # Decoding rows come first: at least one token a row, so this is never negative.
            budget -= len(self._decoding)
            budget = self._pacer.budget(len(self._decoding), budget)
        drafted = self._drafting.take_drafted()
        for row in drafted:
            self._add_drafts(plan, row)
        if not drafted:
            budget = self._continue_prefills(plan, budget)
            self._admit(plan, budget)
        if not plan.chunks and not (plan.decode_steps and len(self._decoding)):
            return None
        self._next_step_id += 1
        self._decoding.tell(plan)
        self.prefix.tell(plan)
        self._spill.tell(plan)
        self.swap.tell(plan)
        self._launched.append(Launched(plan, self._slots.owners(), opened))
        for chunk in plan.chunks:
            sequence = self._slots.owner(chunk.slot)
            self.prefix.register(sequence, sequence.num_computed)
            if chunk.samples and not chunk.num_drafts:
                del self._prefilling[sequence]
                self._decoding.add(sequence)
        self._choices.queue_forked()
        return plan

    def commit(
        self,
        rows: list[int],
        token_ids: list[list[int]],
        *,
        device_ns: int = 0,
        page_ns: Seq[float] = (),
    ) -> Commit:
        """Takes in the tokens of the oldest launched plan.

        Args:
            rows: slot of each live row: the decoding rows, then the plan's chunks in order.
            token_ids: the tokens of each live row, one a decode step; as `StepOutputs` where
                drafts were verified.
            device_ns, page_ns: as `StepOutputs` has them; 0 and empty where not measured.
        """
        launched = self._launched.popleft()
        self.swap.costs.observe(launched.plan, len(rows), device_ns, page_ns)
        commit = launched.read(rows, token_ids, self._clock_ns)
        for sequence in commit.finished:
            self._end(sequence)
        for sequence, num_drafts, num_tokens in commit.verified:
            self._meter.sampled(sequence, num_tokens)
            if sequence.reason is None:
                self._drafting.verified(sequence, num_drafts, num_tokens)
        if self.num_running <= self._drafting.max_rows:
            self._drafting.take_in(commit.sequences)
        for sequence in launched.opened:
            if sequence.state is SequenceState.DECODING:
                known = min(len(sequence.token_ids), self._decoding.position(sequence))
                self.prefix.register(sequence, known)
        return commit

    # ------------------------------------------------------------------ parts of a plan

    @property
    def may_draft(self) -> bool:
        """Whether the next call may verify drafts: it holds no chunk of a prompt, and few rows."""
        quiet = not self._prefilling and not self.num_waiting
        return quiet and self.num_running <= self._drafting.max_rows

    def regroup(self, may_draft: bool) -> None:
        """Decides who drafts in the next plan; to be called before `decode_steps`.

        Args:
            may_draft: whether all copies of the model `may_draft`.
        """
        self._retire()
        self._drafting.regroup(may_draft)

    def measured(self, num_tokens: int, ns: float, *, verifies: bool) -> None:
        """As `DraftCosts.measure`."""
        self._drafting.costs.measure(num_tokens, ns, verifies=verifies)

    def decode_steps(self) -> int:
        """Decode steps of the next call: several only if nothing had to be done between them."""
        self._retire()
        steps = self._config.decode_steps
        if steps == 1 or self.num_waiting or self._prefilling or not len(self._decoding):
            return 1
        if len(self._drafting):
            return 1
        if self._decoding.any_done_within(steps):
            return 1
        num_opened = len(self._decoding.opening(steps))
        if any(pool.num_free < num_opened for pool in self.pages.pools):
            return 1
        return steps

    def _retire(self) -> None:
        """Lets go of rows whose last token is launched."""
        for sequence in self._decoding.done():
            self._stop_decoding(sequence)
            self._leave_slot(sequence)
            sequence.state = SequenceState.RETIRED

    def _open_pages(self, plan: Plan) -> list[Sequence]:
        """Gives decoding rows that come to a new page one, preempting the worst if need be.

        Returns:
            These rows.
        """
        opening = self._decoding.opening(plan.decode_steps)
        for sequence, position in opening:
            while sequence.state is SequenceState.DECODING:
                # What a window has passed is given back as of the call's first step: the pages
                # may go to rows of this very call.
                first = self._decoding.position(sequence)
                entries = self.pages.extend(sequence.table, first, position + 1)
                if entries is not None:
                    plan.enter(sequence.slot, entries)
                    break
                self._make_room(None)
        return [sequence for sequence, _ in opening]

    def _continue_prefills(self, plan: Plan, budget: int) -> int:
        """Chunks for sequences that hold a slot; returns the budget that is left."""
        for sequence in sorted(self._prefilling, key=_rank):
            budget = self._admit(plan, budget, sequence.level)
            if budget == 0:
                continue
            if sequence.state is not SequenceState.PREFILLING:
                continue  # preempted for a better one, just now
            plan.enter(sequence.slot, self.prefix.catch_up(sequence))
            end = chunk_end(self._phase, sequence, budget)
            if end == sequence.num_computed:
                continue  # in a step of another kind
            entries = self.pages.extend(sequence.table, sequence.num_computed, end)
            while entries is None and self._make_room(sequence):
                entries = self.pages.extend(sequence.table, sequence.num_computed, end)
            if entries is None:
                end = min(end, self.pages.reachable(sequence.table, sequence.num_computed))
                if end <= sequence.num_computed or self._phase is Phase.PROMPTS:
                    continue  # the worst-ranked of all, and no page is free: it waits a step
                entries = self.pages.extend(sequence.table, sequence.num_computed, end)
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
        while True:
            level = self._waiting.best_level
            # Who was preempted in this plan, and who stands behind it, would come right back.
            if level is None or level >= above or level >= self._set_back_level:
                return budget
            if not (budget and self._slots.num_free) and self._slots.worst_level <= level:
                return budget
            sequence = self._waiting.peek()
            if sequence is None or sequence.has_unread:
                return budget  # preempted a moment ago: its last tokens are still on their way
            if self.prefix.find(sequence):
                self._choices.hold(sequence)
            if chunk_end(self._phase, sequence, max(budget, 1)) == sequence.num_computed:
                return budget  # its turn comes with a step of another kind
            if not self._slots.num_free or not self._room.is_for(sequence, self.num_running):
                victims = self._room.victims(sequence, self._slots, self._planned)
                gained = sum(victim.state is SequenceState.DECODING for victim in victims)
                gained *= min(plan.decode_steps, 1)
                if not victims or budget + gained == 0:
                    return budget
                for victim in victims:
                    self._preempt(victim)
                budget += gained
                if not self._room.is_for(sequence, self.num_running):
                    return budget
            if budget == 0:
                return budget
            end = chunk_end(self._phase, sequence, budget)
            copies = self.pages.own(sequence.table, sequence.num_computed)
            if copies is None:
                if not self.num_running and self._choices.reclaim(sequence):
                    continue
                return budget
            entries = self.pages.extend(sequence.table, sequence.num_computed, end)
            if entries is None:  # alone, and a window group holds only a part of the budget
                end = min(end, self.pages.reachable(sequence.table, sequence.num_computed))
                entries = self.pages.extend(sequence.table, sequence.num_computed, end)
                assert entries is not None and end > sequence.num_computed
            self._waiting.pop()
            self._choices.leaves_queue(sequence)
            self._take_slot(plan, sequence)
            plan.page_copies += [PageCopy(group=g, source=s, target=t) for g, s, t in copies]
            self.swap.restore(plan, sequence)
            plan.enter(sequence.slot, self.pages.entries(sequence.table))
            budget = self._left(budget, self._add_chunk(plan, sequence, end))

    def _left(self, budget: int, used: int) -> int:
        """The step's tokens that are left; a step of a prompt holds no second chunk."""
        return 0 if self._phase is Phase.PROMPTS else budget - used

    # ------------------------------------------------------------------ changes of state

    def _add_chunk(self, plan: Plan, sequence: Sequence, end: int) -> int:
        """Plans the known tokens up to `end`; returns how many."""
        start = sequence.num_computed
        plan.chunks.append(chunk_of(sequence, end, again=self._phase is Phase.PROMPTS))
        self._planned.add(sequence)
        sequence.reach(start, end)
        if end == len(sequence.token_ids):
            sequence.num_planned = sequence.num_outputs + 1
            self._meter.sampled(sequence)
        if sequence.followers and end >= sequence.prompt_len:
            self._choices.fork(sequence)
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
        self._slots.take(sequence)
        sequence.count_found()
        self.prefix.joined(sequence)
        if self._set_back_level < math.inf:
            plan.forget_entries(sequence.slot)  # of whoever had the slot until now
        sequence.state = SequenceState.PREFILLING
        sequence.has_begun = True
        sequence.scheduled_ns = sequence.scheduled_ns or self._clock_ns()
        self._prefilling[sequence] = None
        plan.joins.append(join_of(sequence))

    def _stop_decoding(self, sequence: Sequence) -> None:
        """Takes out a row whose known tokens are launched: one that decodes or drafts."""
        decodes = sequence.state is SequenceState.DECODING
        (self._decoding if decodes else self._drafting).remove(sequence)
        known = min(len(sequence.token_ids), sequence.num_computed)
        self.prefix.register(sequence, known)

    def _leave_slot(self, sequence: Sequence) -> None:
        self.pages.release(sequence.table)
        self._slots.leave(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Takes an ended sequence out of wherever it is and settles its counts."""
        state = sequence.state
        if state is SequenceState.HELD:
            self._choices.desert(sequence)
        elif state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            self._choices.leaves_queue(sequence)
            self.pages.release(sequence.table)
            self.swap.drop(sequence)
        elif state is SequenceState.PREFILLING:
            del self._prefilling[sequence]
            self._leave_slot(sequence)
        elif state in (SequenceState.DECODING, SequenceState.DRAFTING):
            self._stop_decoding(sequence)
            self._leave_slot(sequence)
        sequence.state = SequenceState.FINISHED
        stop_tokens = int(sequence.stop_token_id is not None)
        sequence.num_discarded += max(sequence.num_planned - sequence.num_outputs - stop_tokens, 0)
        self._choices.lead(sequence.followers)

    def _make_room(self, needy: Sequence | None) -> bool:
        """Frees some pages: those that waiting sequences hold, else the worst running row's.

        Args:
            needy: only sequences of worse rank than this may be preempted; None: any.
        """
        if self._choices.reclaim():
            return True
        victim = next(worst_first(self._slots.holders, self._planned), None)
        if victim is None or (needy is not None and victim.rank <= needy.rank):
            return False
        self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, at its old place; its pages go to the host or are computed again."""
        if sequence.state is SequenceState.PREFILLING:
            del self._prefilling[sequence]
        else:
            self._stop_decoding(sequence)
        self.swap.set_back(sequence)
        self._slots.leave(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._set_back_level = min(self._set_back_level, sequence.level)
        sequence.state = SequenceState.WAITING
        self._waiting.push(sequence)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
