"""One scheduler for each copy of the model, behind the interface of one.

A request goes to one copy, all its choices together, since they share pages; there it stays. It is
the copy that has most of the prompt cached, of those that have at most a quarter of `max_rows` (at
least one) more sequences than the least loaded; where that is equal, the one with the fewest
sequences. So a hit is worth a short wait, and a prompt that all begin with is soon on every copy.
Each copy plans for itself, but all take part in each device call, so that
the call runs as many decode steps as every copy can take. With one copy this is that scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.scheduler import Commit, Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason, ModelInfo, SamplingParams


class Schedulers:
    """Decides what runs on each copy; see the module.

    Args:
        copies: how many there are; every copy has the limits of `config`, a pool of `num_pages` and
            `host_pages` on the host.
        config, model, page_size, num_pages, host_pages, preemption, cache, clock_ns: as
            `Scheduler` takes them.
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
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        pages, on_host = tuple(num_pages), tuple(host_pages)
        self._schedulers = [
            Scheduler(
                config,
                model,
                page_size=page_size,
                num_pages=pages,
                cache=cache,
                host_pages=on_host,
                preemption=preemption,
                clock_ns=clock_ns,
            )
            for _ in range(copies)
        ]
        self._load_margin = max(config.max_rows // 4, 1)
        self._next_step_id = 0

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
        arrived_ns: int = 0,
    ) -> list[Sequence]:
        """As `Scheduler.submit`, to the copy that the module says."""
        copy = self._choose(prompt, tenant, cache_salt)
        sequences = self._schedulers[copy].submit(
            keys,
            prompt,
            sampling,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            arrived_ns=arrived_ns,
        )
        for sequence in sequences:
            sequence.copy = copy
        return sequences

    def _choose(self, prompt: list[int], tenant: str, cache_salt: str) -> int:
        if len(self._schedulers) == 1:
            return 0
        loads = [scheduler.num_waiting + scheduler.num_running for scheduler in self._schedulers]
        most = min(loads) + self._load_margin

        def key(copy: int) -> tuple[int, int, int]:
            scheduler = self._schedulers[copy]
            root = scheduler.prefix.root(tenant, cache_salt)
            cached = scheduler.prefix.num_cached(prompt, root)
            return -cached, loads[copy], scheduler.pages.num_used

        return min((copy for copy, load in enumerate(loads) if load <= most), key=key)

    def cancel(self, sequence: Sequence, reason: FinishReason) -> None:
        """As `Scheduler.cancel`."""
        self._schedulers[sequence.copy].cancel(sequence, reason)

    def plan(self) -> list[Plan | None] | None:
        """The next device call: a plan for each copy, None where it has nothing to do.

        Returns:
            None if there is nothing to launch at all.
        """
        steps = [s.decode_steps() for s in self._schedulers if s.num_running or s.num_waiting]
        plans = [scheduler.plan(min(steps, default=1)) for scheduler in self._schedulers]
        if all(plan is None for plan in plans):
            return None
        for plan in plans:
            if plan is not None:
                plan.step_id = self._next_step_id
        self._next_step_id += 1
        return plans

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
