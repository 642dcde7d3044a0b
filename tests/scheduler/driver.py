"""A scheduler driven without any device, in integers: fast enough for thousands of traces.

The driver keeps its own account of who was served what, from the plans alone, and of the gaps of
weighted service between tenants that wait at the same time.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.types import FinishReason, ModelInfo, SamplingParams
from tests.fakes.executor import FULL

EOS = 0
TOKEN = 1
MODEL = ModelInfo(
    name="fake", max_context=10**6, vocab_size=2, eos_token_ids=(EOS,), cache_groups=(FULL,)
)


#: States in which a sequence holds a slot.
RUNNING = (SequenceState.PREFILLING, SequenceState.DECODING, SequenceState.DRAFTING)


@dataclass
class Gap:
    """Of weighted service between two tenants, over a time in which both wait."""

    lowest: float
    highest: float


@dataclass
class Driver:
    """Turns a scheduler as the engine does, one step in flight.

    Attributes:
        cache: none by default: prompts of which only the length is given are all of one token.
        host_pages: for sequences that were set back, and for cached pages.
        served: (priority, tenant) → weighted service, prompts counted when they are let in, without
            what was found in the cache. What is found only later comes off the next prompts.
        owed: (priority, tenant) → price of what was counted and then found, and is to come off.
        found_later: prompt tokens that were found after they had been counted.
        widest: (priority, tenant, tenant) → the widest gap so far.
        first_token_at: the call whose tokens had a sequence's first.
    """

    config: SchedulerConfig
    num_pages: int = 65
    page_size: int = 4
    stop_chance: float = 0.0
    seed: int = 0
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(prefix=False))
    host_pages: int = 0
    num_calls: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    submitted_at: dict[Sequence, int] = field(default_factory=dict)
    first_token_at: dict[Sequence, int] = field(default_factory=dict)
    ends: Counter[Sequence] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)
    served: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    widest: dict[tuple[int, str, str], float] = field(default_factory=lambda: defaultdict(float))
    owed: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    found_later: int = 0
    now_ns: int = 10**9

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.config,
            MODEL,
            page_size=self.page_size,
            num_pages=[self.num_pages],
            cache=self.cache,
            host_pages=[self.host_pages] if self.host_pages else [],
            preemption=self.cache.preemption,
            clock_ns=lambda: self.now_ns,
        )
        self.random = random.Random(self.seed)
        self.tenants: dict[Sequence, tuple[int, str]] = {}
        self.waiting: dict[tuple[int, str], set[Sequence]] = defaultdict(set)
        self._reached: dict[Sequence, int] = {}  # tokens launched or found, of who was let in
        self._decoding: dict[int, None] = {}
        self._in_flight: deque[tuple[list[int], Plan]] = deque()
        self._gaps: dict[tuple[int, str, str], Gap] = {}
        self._emptied: set[tuple[int, str]] = set()  # who had nobody in the queue, for a moment
        self.scheduler._waiting.remove = self._remove  # type: ignore[method-assign]

    def submit(
        self,
        prompt: int | list[int],
        max_tokens: int,
        *,
        tenant: str = "",
        priority: int = 0,
        weight: float = 1.0,
        n: int = 1,
    ) -> list[Sequence]:
        """A request; its sequences.

        Args:
            prompt: its tokens, or only how many.
        """
        self.weights[tenant] = weight
        keys = [("client", len(self.sequences) + i) for i in range(n)]
        sampling = SamplingParams(max_tokens=max_tokens, seed=0)
        sequences = self.scheduler.submit(
            keys,
            [TOKEN] * prompt if isinstance(prompt, int) else prompt,
            sampling,
            priority=priority,
            tenant=tenant,
            weight=weight,
        )
        for shed, _ in self.scheduler.shedding.take():
            self.ends[shed] += 1
        self.sequences += sequences
        for sequence in sequences:
            self.tenants[sequence] = (priority, tenant)
            self.submitted_at[sequence] = self.num_calls
        self.note_gaps()
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence from outside."""
        if sequence.reason is None:
            self.scheduler.cancel(sequence, FinishReason.CANCELLED)
            self.ends[sequence] += 1
            self.note_gaps()

    def turn(self) -> Plan | None:
        """One turn of the loop; the plan that was launched."""
        plan = self.scheduler.plan()
        if plan is not None:
            self._launch(plan)
        self.note_gaps()
        if len(self._in_flight) > (plan is not None):
            self._read()
        return plan

    def run(self, limit: int = 100_000) -> None:
        """Turns until nothing is left to do."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.turn()
        assert not self.scheduler.has_work, "the scheduler does not come to an end"
        assert self.scheduler.pages.num_used == 0
        assert self.scheduler.swap.num_used == self.scheduler.swap.num_sequences == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.ends == Counter(self.sequences)

    def note_gaps(self) -> None:
        """Looks at every pair of tenants that wait at the same priority."""
        queue = self.scheduler._waiting
        emptied, self._emptied = self._emptied, set()
        by_tenant = {
            (priority, account.tenant)
            for priority, rank in queue._ranks.items()
            for account in rank.lines
        }
        one_for_all = self.config.fairness == "fcfs"
        waiting = {self.tenants[s] for s in queue._entries} if one_for_all else by_tenant
        gaps = {}
        for (level, one), (other_level, other) in itertools.combinations(sorted(waiting), 2):
            if level != other_level:
                continue
            key = (level, one, other)
            now = self.served[level, one] - self.served[level, other]
            gap = self._gaps.get(key)
            if gap is None or not emptied.isdisjoint([(level, one), (level, other)]):
                gap = Gap(now, now)
            gaps[key] = Gap(min(gap.lowest, now), max(gap.highest, now))
            self.widest[key] = max(self.widest[key], gaps[key].highest - gaps[key].lowest)
        self._gaps = gaps

    def _remove(self, sequence: Sequence) -> None:
        queue, account = self.scheduler._waiting, sequence.account
        type(queue).remove(queue, sequence)
        assert account is not None
        if not account.num_waiting:  # choices may wait for its prompt, but cannot be let in
            self._emptied.add((sequence.level, account.tenant))

    def _launch(self, plan: Plan) -> None:
        self.num_calls += 1
        for slot in plan.decode_leaves:
            del self._decoding[slot]
        self._decoding |= dict.fromkeys(plan.decode_joins)
        assert not set(self._decoding) & {chunk.slot for chunk in plan.chunks}
        entries = [(slot, group, index) for group, slot, index, _ in plan.page_entries]
        assert len(set(entries)) == len(entries), "a page-table entry is written twice in a step"
        num_tokens = len(self._decoding) + sum(len(chunk.token_ids) for chunk in plan.chunks)
        assert num_tokens <= self.config.max_step_tokens
        rows = [*self._decoding, *(chunk.slot for chunk in plan.chunks)]
        self._in_flight.append((rows, plan))
        owners = self.scheduler._launched[-1].owners
        for slot in self._decoding:
            self._serve(owners[slot], self.config.output_token_price * plan.decode_steps)
        for chunk in plan.chunks:
            sequence = owners[chunk.slot]
            assert sequence is not None
            self._serve_prompt(sequence, chunk.start, chunk.start + len(chunk.token_ids))
            if chunk.samples and not chunk.num_drafts:
                self._serve(sequence, self.config.output_token_price)

    def _serve_prompt(self, sequence: Sequence, start: int, end: int) -> None:
        """Known tokens start … end - 1 are computed; those before them have been, or were found."""
        owed, price = self.owed, self.config.input_token_price
        reached = self._reached.get(sequence)
        tenant = self.tenants[sequence]
        if reached is None:
            counted = (sequence.prompt_len - start) * price
            taken = min(counted, owed[tenant])
            owed[tenant] -= taken
            self._serve(sequence, counted - taken)
        else:
            found = max(min(start, sequence.prompt_len) - reached, 0)
            owed[tenant] += found * price
            self.found_later += found
        self._reached[sequence] = max(reached or 0, end)

    def _serve(self, sequence: Sequence | None, price: float) -> None:
        assert sequence is not None
        level, tenant = self.tenants[sequence]
        self.served[level, tenant] += price / self.weights[tenant]

    def _read(self) -> None:
        rows, plan = self._in_flight.popleft()
        sampled = [
            [EOS if self.random.random() < self.stop_chance else TOKEN] * plan.decode_steps
            for _ in rows
        ]
        owners = self.scheduler._launched[0].owners
        for row, chunk in enumerate(plan.chunks, len(rows) - len(plan.chunks)):
            if chunk.num_drafts:  # what was sampled after each of them, up to the first wrong one
                while len(sampled[row]) <= chunk.num_drafts and sampled[row][-1] == TOKEN:
                    stops = self.random.random() < self.stop_chance
                    sampled[row].append(EOS if stops else TOKEN)
                price = self.config.output_token_price * len(sampled[row])
                self._serve(owners[chunk.slot], price)
        width = max(map(len, sampled))
        commit = self.scheduler.commit(rows, [row + [-1] * (width - len(row)) for row in sampled])
        for sequence in commit.sequences:
            self.first_token_at.setdefault(sequence, self.num_calls)
        for sequence in commit.finished:
            self.ends[sequence] += 1

    def check_accounts(self) -> None:
        """What must hold between any two turns: nothing is lost, leaked or in two places."""
        scheduler = self.scheduler
        states = Counter(sequence.state for sequence in self.sequences)
        running = sum(states[state] for state in RUNNING)
        waiting = states[SequenceState.WAITING] + states[SequenceState.HELD]
        assert scheduler.num_running == running == scheduler._rows.slots.num_taken
        assert scheduler.num_waiting == waiting
        slots = [s.slot for s in self.sequences if s.state in RUNNING]
        assert len(set(slots)) == len(slots)
        held = Counter(page for s in self.sequences for page in s.table.pages[0] if page)
        pool = scheduler.pages.pools[0]
        assert held == Counter({page: pool.num_holders(page) for page in held})
        assert pool.num_used == len(held)
        tallies = scheduler._rows.meter.tallies
        assert sum(len(tally.running) for tally in tallies.values()) == running
        assert sum(len(t.decoding) for t in tallies.values()) == states[SequenceState.DECODING]
