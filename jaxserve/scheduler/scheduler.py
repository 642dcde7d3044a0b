"""The scheduler: each step, which sequences get how many tokens, which slots and which pages.

`plan()` says what the next device call does, `commit()` takes in what an earlier one sampled. The
engine's loop calls them so that plan n + 1 is made before the tokens of plan n are read; what that
delay means is written in `engine.loop`. Integers only: no arrays, no device.

One budget, no phases: decoding rows bring a token each, the rest of `max_step_tokens` goes to
sequences whose known tokens are not all computed and to those that wait, better levels first
(`scheduler.planner`). Those that wait are let in in the queue's order (`scheduler.queue`); one of a
better level takes slots and pages from worse ones (`scheduler.room`), but only if they are enough
to run it at once.

Invariants: a sequence of better rank is never preempted for one of worse rank, and what fits the
pool alone is let in, so the best always comes to its end; the one exception are rows whose tenant
is at the bound of fairness (`scheduler.accounts`). Who is preempted does not come back in the same
plan. Only rows that join, leave, open a page or end are visited by `plan`; how many wait makes no
difference. A decoding row's full page becomes findable (`scheduler.prefix`) when the step that
opens its next one is read, so that nobody is visited for it.

The device may wait for a plan, and works while the step before is read. So `commit` does all that
need not be in a plan: it makes the pages of the launched chunks findable (`_settle`), lets go of
rows whose last token is launched, takes the pages that the next step opens (`scheduler.opening`),
has others free for the next plan, and looks at who waits near whose front. Where no commit comes
before it, a plan does this itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.accounts import Accounts, Meter
from jaxserve.scheduler.adapters import AdapterTable
from jaxserve.scheduler.admission import check_cache, check_context
from jaxserve.scheduler.commit import Commit, Launched
from jaxserve.scheduler.host_pages import HostPages
from jaxserve.scheduler.pace import Pacer
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.phases import Phase, phase_of
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.planner import Planner
from jaxserve.scheduler.prefix import PrefixCache
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.rows import Rows
from jaxserve.scheduler.sequence import AdapterUse, Resumed, Sequence, SequenceState
from jaxserve.scheduler.shedding import Shedding
from jaxserve.scheduler.slots import Owners
from jaxserve.scheduler.spill import Spill
from jaxserve.scheduler.swap import Swap
from jaxserve.types import FinishReason, ModelInfo, SamplingParams

_NONE: frozenset[int] = frozenset()


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
        adapter_slots: of each class of LoRA adapters; none where there are none.
        clock_ns: CLOCK_MONOTONIC.

    Attributes:
        pages: the allocator.
        adapters: what is in their slots.
        prefix: the cache of pages by content.
        shedding: of the queue; counts who was refused or shed.
        swap: what preempted sequences have on the host.
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
        adapter_slots: Iterable[int] = (),
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.pages = PageAllocator(page_size, model.cache_groups, list(num_pages))
        host = HostPages(list(host_pages))
        self.swap = Swap(self.pages, host, preemption)
        self._spill = Spill(self.pages, host)
        self.prefix = PrefixCache(
            self.pages, self._spill, self.swap.costs, cache or CacheConfig(), model.name
        )
        self._config = config
        self._model = model
        self._ends = frozenset(model.eos_token_ids)
        self._clock_ns = clock_ns
        self._accounts = accounts or Accounts(config)
        meter = Meter(self._accounts, self.pages.capacity_tokens)
        self._waiting = WaitingQueue(
            config,
            self._accounts,
            meter,
            cached_tokens=cached_tokens or self.prefix.num_cached_of,
            clock_ns=clock_ns,
        )
        self.shedding = Shedding(config, self._waiting)
        self.adapters = AdapterTable(adapter_slots)
        self._rows = Rows(
            config, self.pages, self.prefix, self.swap, self._waiting, meter, self.adapters
        )
        pacer = pacer or Pacer(config.max_step_ms, config.max_step_tokens)
        self._planner = Planner(config, self._rows, pacer, clock_ns)
        self._launched: deque[Launched] = deque()
        self._is_settled = True
        self._next_step_id = 0
        self._num_arrived = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no slot and have not ended."""
        return self._rows.num_waiting

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return self._rows.num_running

    @property
    def num_preemptions(self) -> int:
        """So far."""
        return self._rows.num_preemptions

    def running(self) -> list[Sequence]:
        """The sequences that hold a slot."""
        rows = self._rows
        return [*rows.decoding, *rows.drafting, *rows.prefilling]

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
        adapter: AdapterUse | None = None,
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
            adapter: its LoRA adapter.

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
                num_free_slots=self._rows.slots.num_free,
                end=self.cancel,
            )
        ends = _NONE if sampling.ignore_eos else self._ends
        stops = ends.union(sampling.stop_token_ids) if sampling.stop_token_ids else ends
        root = self.prefix.root(tenant, cache_salt, adapter.key if adapter is not None else "")
        digests = self.prefix.digests_of(prompt, root)
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
                    digests=list(digests),
                    queued_ns=self._clock_ns(),
                    request=request,
                    adapter=adapter,
                )
            )
        if resumed is not None:
            for place, sequence in enumerate(sequences):
                sequence.resume(
                    resumed.emitted[place], resumed.num_prompt_logprobs, resumed.queued_ns[place]
                )
        self._rows.choices.lead(sequences)
        return sequences

    def cancel(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence now, wherever it is; what is launched for it is discarded when read."""
        if sequence.reason is None:
            self._settle()
            sequence.reason = reason
            self._rows.end(sequence)

    def phases(self) -> set[Phase]:
        """The kinds of step that there is work for, where they take turns."""
        self._settle()
        self._rows.unpark()  # those that wait for an adapter's slot are not in the queue
        found = {phase_of(sequence) for sequence in self._rows.prefilling}
        if len(self._rows.decoding):
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
        self._waiting.refresh()
        plan.decode_steps = self.decode_steps()
        if max_decode_steps is not None:
            plan.decode_steps = min(plan.decode_steps, max_decode_steps)
        opened = self._planner.fill(plan, phase)
        if not plan.chunks and not (plan.decode_steps and len(self._rows.decoding)):
            return None
        self._next_step_id += 1
        self._rows.ahead.tell(plan)
        self._rows.decoding.tell(plan)
        self.prefix.tell(plan)
        self._spill.tell(plan)
        self.swap.tell(plan)
        self.adapters.tell(plan)
        self._launched.append(Launched(plan, self._rows.slots.owners(), opened))
        self._rows.choices.queue_forked()
        self._is_settled = False
        return plan

    def owners(self) -> Owners:
        """By slot, who takes part in the plan that was made last."""
        return self._launched[-1].owners

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
        self._settle()
        launched = self._launched.popleft()
        self.swap.costs.observe(launched.plan, len(rows), device_ns, page_ns)
        commit = launched.read(rows, token_ids, self._clock_ns)
        for sequence in commit.finished:
            self._rows.end(sequence)
        for sequence, num_drafts, num_tokens in commit.verified:
            self._rows.meter.sampled(sequence, num_tokens)
            if sequence.reason is None:
                self._rows.drafting.verified(sequence, num_drafts, num_tokens)
        if self.num_running <= self._rows.drafting.max_rows:
            self._rows.drafting.take_in(commit.sequences)
        for sequence in launched.opened:
            if sequence.state is SequenceState.DECODING:
                known = min(len(sequence.token_ids), self._rows.decoding.position(sequence))
                self.prefix.register(sequence, known)
        self._rows.retire()
        self._rows.ahead.open()
        self.pages.stock()
        self._waiting.look_ahead()
        return commit

    def _settle(self) -> None:
        """What follows from the launch of the last plan; before anything else is decided."""
        if self._is_settled:
            return
        self._is_settled = True
        for chunk in self._launched[-1].plan.chunks:
            sequence = self._rows.slots.owner(chunk.slot)
            self.prefix.register(sequence, sequence.num_computed)
            if chunk.samples and not chunk.num_drafts:
                del self._rows.prefilling[sequence]
                self._rows.decoding.add(sequence)

    # ------------------------------------------------------------------ parts of a plan

    @property
    def may_draft(self) -> bool:
        """Whether the next call may verify drafts: it holds no chunk of a prompt, and few rows."""
        self._settle()
        quiet = not self._rows.prefilling and not self.num_waiting
        return quiet and self.num_running <= self._rows.drafting.max_rows

    def regroup(self, may_draft: bool) -> None:
        """Decides who drafts in the next plan; to be called before `decode_steps`.

        Args:
            may_draft: whether all copies of the model `may_draft`.
        """
        self._rows.retire()
        self._rows.drafting.regroup(may_draft)

    def measured(self, num_tokens: int, ns: float, *, verifies: bool) -> None:
        """As `DraftCosts.measure`."""
        self._rows.drafting.costs.measure(num_tokens, ns, verifies=verifies)

    def decode_steps(self) -> int:
        """Decode steps of the next call: several only if nothing had to be done between them."""
        self._rows.retire()
        steps = self._config.decode_steps
        if steps == 1 or self.num_waiting or self._rows.prefilling or not len(self._rows.decoding):
            return 1
        if len(self._rows.drafting) or self._rows.decoding.num_constrained:
            return 1
        if self._rows.decoding.any_done_within(steps):
            return 1
        num_opened = len(self._rows.decoding.opening(steps)) - self._rows.ahead.num_decoding
        if any(pool.num_free < num_opened for pool in self.pages.pools):
            return 1
        return steps
