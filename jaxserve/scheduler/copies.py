"""One scheduler for each copy of the model, behind the interface of one.

A request goes to the copy with the fewest sequences, all its choices together, since they share
pages; there it stays. Tenants' counters are common to all copies: a tenant that one copy serves is
behind in the others' queues, though each can only choose among those that wait with it, so the
bound of fairness is one between tenants that wait at the same copy. Each copy plans for itself,
but all take part in each device call, so that the call runs as many decode steps as every copy can
take. With one copy this is that scheduler.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq

from jaxserve.config import SchedulerConfig
from jaxserve.errors import Overloaded
from jaxserve.scheduler.accounts import Accounts
from jaxserve.scheduler.pace import Pacer
from jaxserve.scheduler.phases import IN_TURN, Phase
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.scheduler import Commit, Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason, ModelInfo, SamplingParams


class Schedulers:
    """Decides what runs on each copy; see the module.

    Args:
        copies: how many there are; every copy has the limits of `config`, a pool of `num_pages` and
            `host_pages` on the host.
        batch_invariant: steps are of one kind each, see `scheduler.phases`.
        config, model, page_size, num_pages, host_pages, preemption, clock_ns: as `Scheduler` takes
            them.
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
        batch_invariant: bool = False,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        accounts = Accounts(config)
        self._pacer = Pacer(config.max_step_ms, config.max_step_tokens)
        pages, on_host = tuple(num_pages), tuple(host_pages)
        self._schedulers = [
            Scheduler(
                config,
                model,
                page_size=page_size,
                num_pages=pages,
                accounts=accounts,
                pacer=self._pacer,
                host_pages=on_host,
                preemption=preemption,
                clock_ns=clock_ns,
            )
            for _ in range(copies)
        ]
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
    def pages_total(self) -> int:
        """Pages that can be handed out."""
        return sum(scheduler.pages.capacity for scheduler in self._schedulers)

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
        weight: float = 1.0,
        arrived_ns: int = 0,
    ) -> list[Sequence]:
        """As `Scheduler.submit`, to the copy with the fewest sequences, then the fewest pages."""

        def load(copy: int) -> tuple[int, int]:
            scheduler = self._schedulers[copy]
            return scheduler.num_waiting + scheduler.num_running, scheduler.pages.num_used

        copy = min(range(len(self._schedulers)), key=load)
        sequences = self._schedulers[copy].submit(
            keys,
            prompt,
            sampling,
            priority=priority,
            tenant=tenant,
            weight=weight,
            arrived_ns=arrived_ns,
        )
        for sequence in sequences:
            sequence.copy = copy
        return sequences

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
