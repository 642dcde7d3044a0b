"""One scheduler for each copy of the model, behind the interface of one.

A request goes to one copy, all its choices together, since they share pages; there it stays. It is
the copy that has most of the prompt cached, of those that have at most a quarter of `max_rows` (at
least one) more sequences than the least loaded; where that is equal, one that has its adapter in a
slot, and then the one with the fewest sequences. So a hit is worth a short wait, and a prompt that
all begin with is soon on every copy.

Tenants' counters are common to all copies: a tenant that one copy serves is behind in the others'
queues, though each can only choose among those that wait with it, so the bound of fairness is one
between tenants that wait at the same copy. Each copy plans for itself, but all take part in each
device call, so that the call runs as many decode steps as every copy can take. With one copy this
is that scheduler.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.errors import Overloaded
from jaxserve.scheduler.accounts import Accounts
from jaxserve.scheduler.pace import Pacer
from jaxserve.scheduler.phases import IN_TURN, Phase
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.scheduler import Commit, Scheduler
from jaxserve.scheduler.sequence import AdapterUse, Resumed, Sequence
from jaxserve.scheduler.slots import Owners
from jaxserve.types import FinishReason, ModelInfo, SamplingParams


class Schedulers:
    """Decides what runs on each copy; see the module.

    Args:
        copies: how many there are; every copy has the limits of `config`, a pool of `num_pages` and
            `host_pages` on the host.
        batch_invariant: steps are of one kind each, see `scheduler.phases`; there is no prefix
            cache then, since a page may have been computed as prompt or as output.
        config, model, page_size, num_pages, host_pages, preemption, cache, adapter_slots, clock_ns:
            as `Scheduler` takes them.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        model: ModelInfo,
        *,
        page_size: int,
        num_pages: Iterable[int],
        host_pages: Iterable[int] = (),
        preemption: str = "auto",
        copies: int = 1,
        cache: CacheConfig | None = None,
        batch_invariant: bool = False,
        adapter_slots: Iterable[int] = (),
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        cache = cache or CacheConfig()
        if batch_invariant:
            cache = dataclasses.replace(cache, prefix=False)
        accounts = Accounts(config)
        self._pacer = Pacer(config.max_step_ms, config.max_step_tokens)
        pages, on_host, slots = tuple(num_pages), tuple(host_pages), tuple(adapter_slots)
        self.num_adapter_slots = sum(slots) * copies
        self._schedulers = [
            Scheduler(
                config,
                model,
                page_size=page_size,
                num_pages=pages,
                cache=cache,
                accounts=accounts,
                pacer=self._pacer,
                host_pages=on_host,
                preemption=preemption,
                adapter_slots=slots,
                clock_ns=clock_ns,
            )
            for _ in range(copies)
        ]
        self._max_rows = config.max_rows
        self._load_margin = max(config.max_rows // 4, 1)
        self._next_step_id = 0
        self._last_phase = Phase.OUTPUTS if batch_invariant else Phase.MIXED

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no slot and have not ended."""
        return sum(scheduler.num_waiting for scheduler in self._schedulers)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return sum(scheduler.num_running for scheduler in self._schedulers)

    @property
    def max_rows(self) -> int:
        """Sequences that can run at once."""
        return self._max_rows * len(self._schedulers)

    def running(self) -> list[Sequence]:
        """The sequences that hold a slot."""
        return [sequence for scheduler in self._schedulers for sequence in scheduler.running()]

    @property
    def num_preemptions(self) -> int:
        """So far."""
        return sum(scheduler.num_preemptions for scheduler in self._schedulers)

    @property
    def has_work(self) -> bool:
        """Whether anything runs, waits, or is launched and not committed."""
        return any(scheduler.has_work for scheduler in self._schedulers)

    @property
    def pages_used(self) -> int:
        """Pages that somebody holds."""
        return sum(scheduler.pages.num_used for scheduler in self._schedulers)

    @property
    def pages_cached(self) -> int:
        """Pages that nobody holds and that can still be found."""
        return sum(scheduler.pages.num_kept for scheduler in self._schedulers)

    @property
    def prefix_lookup_tokens(self) -> int:
        """Known tokens of the sequences that joined, so far."""
        return sum(scheduler.prefix.num_lookup_tokens for scheduler in self._schedulers)

    @property
    def prefix_hit_tokens(self) -> int:
        """Of these, those found instead of computed."""
        return sum(scheduler.prefix.num_hit_tokens for scheduler in self._schedulers)

    @property
    def pages_total(self) -> int:
        """Pages that can be handed out."""
        return sum(scheduler.pages.capacity for scheduler in self._schedulers)

    @property
    def num_adapters_held(self) -> int:
        """Adapters in slots."""
        return sum(scheduler.adapters.num_held for scheduler in self._schedulers)

    @property
    def num_adapter_joins(self) -> int:
        """Rows that were taken with an adapter, so far."""
        return sum(scheduler.adapters.num_joins for scheduler in self._schedulers)

    @property
    def num_adapter_hits(self) -> int:
        """Of these, those whose adapter was in a slot."""
        return sum(scheduler.adapters.num_hits for scheduler in self._schedulers)

    @property
    def num_shed(self) -> dict[str, int]:
        """Sequences that a full queue refused or pushed out so far, by reason."""
        total: Counter[str] = Counter()
        for scheduler in self._schedulers:
            total += scheduler.shedding.counts
        return dict(total)

    @property
    def num_swapped(self) -> int:
        """Waiting sequences whose pages are on the host."""
        return sum(scheduler.swap.num_sequences for scheduler in self._schedulers)

    @property
    def host_pages_used(self) -> int:
        """Pages on the host that somebody holds."""
        return sum(scheduler.swap.num_used for scheduler in self._schedulers)

    @property
    def host_pages_total(self) -> int:
        """Pages on the host that can be held."""
        return sum(scheduler.swap.capacity for scheduler in self._schedulers)

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
        """As `Scheduler.submit`, to the copy that the module says."""
        copy = self._choose(prompt, tenant, cache_salt, adapter)
        sequences = self._schedulers[copy].submit(
            keys,
            prompt,
            sampling,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            weight=weight,
            arrived_ns=arrived_ns,
            request=request,
            resumed=resumed,
            adapter=adapter,
        )
        for sequence in sequences:
            sequence.copy = copy
        return sequences

    def _choose(
        self, prompt: list[int], tenant: str, cache_salt: str, adapter: AdapterUse | None
    ) -> int:
        if len(self._schedulers) == 1:
            return 0
        loads = [scheduler.num_waiting + scheduler.num_running for scheduler in self._schedulers]
        most = min(loads) + self._load_margin

        def key(copy: int) -> tuple[int, bool, int, int]:
            scheduler = self._schedulers[copy]
            root = scheduler.prefix.root(tenant, cache_salt, adapter.key if adapter else "")
            cached = scheduler.prefix.num_cached(prompt, root)
            away = adapter is not None and not scheduler.adapters.holds(
                adapter.rank_class, adapter.key
            )
            return -cached, away, loads[copy], scheduler.pages.num_used

        return min((copy for copy, load in enumerate(loads) if load <= most), key=key)

    def cancel(self, sequence: Sequence, reason: FinishReason) -> None:
        """As `Scheduler.cancel`."""
        self._schedulers[sequence.copy].cancel(sequence, reason)

    def take_shed(self) -> list[tuple[Sequence, Overloaded]]:
        """Sequences that were ended for newcomers since the last call, and what they are told."""
        return [shed for scheduler in self._schedulers for shed in scheduler.shedding.take()]

    def plan(self) -> list[Plan | None] | None:
        """The next device call: a plan for each copy, None where it has nothing to do.

        Returns:
            None if there is nothing to launch at all.
        """
        if self._last_phase is Phase.MIXED:
            may_draft = all(scheduler.may_draft for scheduler in self._schedulers)
            for scheduler in self._schedulers:
                scheduler.regroup(may_draft)
            steps = [s.decode_steps() for s in self._schedulers if s.num_running or s.num_waiting]
            plans = self._plans(min(steps, default=1), Phase.MIXED)
        else:
            plans = self._plans_in_turn()
        if all(plan is None for plan in plans):
            return None
        for plan in plans:
            if plan is not None:
                plan.step_id = self._next_step_id
        self._next_step_id += 1
        return plans

    def _plans(self, decode_steps: int, phase: Phase) -> list[Plan | None]:
        return [scheduler.plan(decode_steps, phase) for scheduler in self._schedulers]

    def _plans_in_turn(self) -> list[Plan | None]:
        """Plans of one kind, of the other if that comes to nothing."""
        found = {phase for scheduler in self._schedulers for phase in scheduler.phases()}
        plans: list[Plan | None] = []
        for phase in (IN_TURN[self._last_phase], self._last_phase):
            if phase in found:
                plans = self._plans(1, phase)
                if any(plan is not None for plan in plans):
                    self._last_phase = phase
                    break
        return plans

    def owners(self, copy: int) -> Owners:
        """As `Scheduler.owners`, of a copy that had a plan."""
        return self._schedulers[copy].owners()

    def measured(
        self,
        plans: Seq[Plan | None],
        num_decode_rows: Seq[int],
        device_ns: int,
        idle_ns: int = 0,
    ) -> None:
        """A device call took so long: from it is learned what a step may hold, and what pays.

        Args:
            num_decode_rows: of each copy.
            device_ns, idle_ns: as `StepOutputs`; 0 where not measured.
        """
        pairs = [(p, rows) for p, rows in zip(plans, num_decode_rows, strict=True) if p is not None]
        steps = max([1, *(plan.decode_steps for plan, _ in pairs)])
        sizes = (rows + sum(len(c.token_ids) for c in plan.chunks) for plan, rows in pairs)
        num_tokens, ns = max(sizes, default=0), device_ns / steps
        chunks = [chunk for plan, _ in pairs for chunk in plan.chunks]
        verifies = any(chunk.num_drafts for chunk in chunks)
        if not verifies:
            self._pacer.observe(num_tokens, ns)
        if verifies or not chunks:
            ns += min(idle_ns, device_ns) if verifies else 0
            for scheduler in self._schedulers:
                scheduler.measured(num_tokens, ns, verifies=verifies)

    def commit(
        self,
        copy: int,
        rows: list[int],
        token_ids: Seq[list[int]],
        *,
        device_ns: int = 0,
        page_ns: Seq[float] = (),
    ) -> Commit:
        """As `Scheduler.commit`, of one copy's plan."""
        return self._schedulers[copy].commit(
            rows, list(token_ids), device_ns=device_ns, page_ns=page_ns
        )
