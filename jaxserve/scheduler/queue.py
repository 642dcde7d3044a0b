"""The waiting queue: sequences that do not run, in the order in which they should.

First by level (a priority; better than all of them, whoever has waited for `longest_wait_s`), then
the tenant with the least counter (`scheduler.accounts`), then by arrival within the tenant. A
preempted sequence comes back to its old place: its arrival, its tenant's counter.

With `locality` (DLPM, arXiv 2501.14312) tenants have a deficit each: those whose counter is less
than a quantum, divided by their weight, above the level's mark may be served, in any order among
them, and the sequence with the longest cached prefix near their fronts goes first. When the least
of those that wait has used its deficit up, the mark moves to its counter. A first sequence that has
been passed over `MAX_PASSED` times goes next.

Invariants: adding, removing and taking the best cost O(log n) however many wait (a counter that
has grown is moved in the heap when it comes to the top; only tenants that run grow). A sequence's
level falls at most once, to `AGED`, and stays there also while it runs.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.accounts import Account, Accounts, Meter
from jaxserve.scheduler.crowd import Crowd
from jaxserve.scheduler.line import Line
from jaxserve.scheduler.sequence import Sequence

#: The level of sequences that have waited too long: better than every priority.
AGED = -(2**31) - 1
#: Sequences that one plan may find to have waited too long; the others are found by the next.
MAX_AGED_A_PLAN = 256
#: With locality: tenants, and sequences of each, whose cached prefixes are looked up.
NUM_TENANTS_SEEN = 8
NUM_FRONT_SEEN = 8
#: With locality: sequences of each behind these that are looked up ahead of a plan, too.
NUM_FOLLOWING = 4
#: With locality: how often the first of a tenant may be passed over.
MAX_PASSED = 64


def no_cache(sequence: Sequence) -> int:
    """The cached tokens of any sequence where there is no prefix cache."""
    return 0


@dataclass(slots=True)
class _Rank:
    """A level's tenants that wait in this queue.

    Attributes:
        heap: (counter, stamp, account); a counter here may be older, and so smaller, than it is.
        stamps: of the entry that counts for an account.
        mark: with locality, what deficits are counted from; never above the least counter.
        in_sight: the first few tenants with a deficit, looked for at look `seen_in`; empty once the
            mark has moved or a tenant has begun or ceased to wait.
    """

    lines: dict[Account, Line] = field(default_factory=dict)
    heap: list[tuple[float, int, Account]] = field(default_factory=list)
    stamps: dict[Account, int] = field(default_factory=dict)
    crowd: Crowd = field(default_factory=Crowd)
    mark: float = float("-inf")
    in_sight: list[Account] = field(default_factory=list)
    seen_in: int = -1


class WaitingQueue:
    """One copy's waiting sequences; see the module.

    Args:
        config: fairness, longest wait.
        accounts: the tenants' counters.
        meter: of the same copy.
        cached_tokens: how many of a sequence's known tokens need not be computed.
        clock_ns: CLOCK_MONOTONIC.

    Attributes:
        num_tokens: known tokens of all waiting sequences, counted when they came.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        accounts: Accounts,
        meter: Meter,
        *,
        cached_tokens: Callable[[Sequence], int] = no_cache,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.num_tokens = 0
        self._accounts = accounts
        self._meter = meter
        self._cached_tokens = cached_tokens
        self._clock_ns = clock_ns
        self._longest_wait_ns = round(config.longest_wait_s * 1e9)
        is_local = config.fairness == "locality"
        self._quantum = config.locality_quantum_tokens if is_local else 0
        self._entries: dict[Sequence, int] = {}  # with how many known tokens each came
        self._ranks: dict[int, _Rank] = {}
        self._levels: list[int] = []  # of those that are not empty, best first
        self._ages: list[tuple[int, int, Sequence]] = []  # (when it has waited too long, …)
        self._stamp = 0
        self._num_looks = 0
        self._is_ahead = False  # what is known of cached prefixes is for the plan to come
        self._cached: dict[Sequence, int] = {}  # with locality, as the last look found them
        self._best: Sequence | None = None  # what `peek` found, until something changes
        accounts.backlogs.append(self)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._entries

    @property
    def best_level(self) -> int | None:
        """Of the sequence that is next; None if nobody waits."""
        return self._levels[0] if self._levels else None

    def least(self, level: int) -> float | None:
        """The least counter of a tenant that waits here at a level; None if nobody does."""
        rank = self._ranks.get(level)
        if rank is None:
            return None
        top = self._top(rank)
        assert top is not None
        return top.counter

    def push(self, sequence: Sequence, *, lift: bool = True) -> None:
        """Adds a sequence that is not in the queue.

        Args:
            lift: whether its tenant, where it begins to wait, comes back from doing so.
        """
        assert sequence not in self._entries
        now_ns = self._clock_ns()
        since_ns = sequence.waits_since_ns  # it was parked: that is waiting, too
        if not since_ns:
            since_ns = now_ns if sequence.scheduled_ns else sequence.queued_ns or now_ns
        sequence.waits_since_ns = since_ns
        num_tokens = self._entries[sequence] = len(sequence.token_ids)
        self.num_tokens += num_tokens
        self._line_up(sequence, lift=lift)
        if self._longest_wait_ns and sequence.level != AGED:
            self._stamp += 1
            due_ns = since_ns + self._longest_wait_ns - sequence.waited_ns
            heapq.heappush(self._ages, (due_ns, self._stamp, sequence))
            if len(self._ages) > 2 * len(self._entries) + 64:
                self._ages = [age for age in self._ages if self._is_due(age)]
                heapq.heapify(self._ages)

    def peek(self) -> Sequence | None:
        """The best sequence, left in the queue; None if nobody waits."""
        if self._best is None and self._levels:
            rank = self._ranks[self._levels[0]]
            top = self._top(rank)
            assert top is not None
            self._best = self._nearest(rank, top) if self._quantum else rank.lines[top].first()
        return self._best

    def pop(self) -> Sequence:
        """Takes the best sequence out."""
        sequence = self.peek()
        assert sequence is not None, "nobody waits"
        if self._quantum:
            line = self._ranks[sequence.level].lines[_account(sequence)]
            line.num_passed = 0 if line.first() is sequence else line.num_passed + 1
        sequence.waited_ns += max(self._clock_ns() - sequence.waits_since_ns, 0)
        sequence.waits_since_ns = 0
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        self.num_tokens -= self._entries.pop(sequence)
        self._step_out(sequence)

    def look_ahead(self) -> None:
        """With locality: looks up the prefixes that the next plan asks for, while there is time."""
        if not self._quantum:
            return
        self._best = None
        self._look_anew()
        if self.peek() is None:
            return
        rank = self._ranks[self._levels[0]]
        for account in rank.in_sight:
            # Some come near the front while the plan takes others from it.
            for sequence in rank.lines[account].front(NUM_FRONT_SEEN + NUM_FOLLOWING):
                self._num_cached(sequence)

    def refresh(self) -> None:
        """A plan begins: counters have grown, and some may have waited too long."""
        self._best = None
        if not self._is_ahead:
            self._look_anew()
        self._is_ahead = False
        if not self._longest_wait_ns or not self._ages:
            return
        now_ns = self._clock_ns()
        for _ in range(MAX_AGED_A_PLAN):
            if not self._ages or self._ages[0][0] > now_ns:
                return
            age = heapq.heappop(self._ages)
            sequence = age[-1]
            if self._is_due(age):
                account = _account(sequence)
                self._step_out(sequence)
                sequence.level = AGED
                sequence.account = self._accounts.account(AGED, account.tenant, account.weight)
                self._line_up(sequence)

    def to_shed(self, level: int, account: Account) -> Sequence | None:
        """The first choice of a request that a newcomer may push out; None if there is none.

        It is the last that came, of the tenant with most sequences waiting at the worst level: one
        worse than the newcomer's, or the same if its tenant would still have fewer waiting.
        """
        for worst in reversed(self._levels):
            if worst < level:
                return None
            crowd = self._ranks[worst].crowd
            largest = crowd.largest()
            assert largest is not None
            if worst == level and crowd.count(account) + 1 >= crowd.count(largest):
                return None
            sequence = self._ranks[worst].lines[largest].last_unbegun()
            if sequence is not None:
                return sequence
        return None

    # ------------------------------------------------------------------ places

    def _look_anew(self) -> None:
        """What was found of cached prefixes is forgotten."""
        self._cached.clear()
        self._num_looks += 1
        self._is_ahead = True

    def _line_up(self, sequence: Sequence, *, lift: bool = True) -> None:
        account = _account(sequence)
        if lift and account.num_waiting == 0:
            account.level.lift(account)
        rank = self._ranks.get(sequence.level)
        if rank is None:
            rank = self._ranks[sequence.level] = _Rank()
            bisect.insort(self._levels, sequence.level)
        account.num_waiting += 1
        account.level.num_waiting += 1
        line = rank.lines.get(account)
        if line is None:
            line = rank.lines[account] = Line()
            self._enter(rank, account, is_back=sequence.has_begun)
        line.add(sequence)
        rank.crowd.change(account, 1)
        self._best = None

    def _step_out(self, sequence: Sequence) -> None:
        account = _account(sequence)
        rank = self._ranks[sequence.level]
        line, level = rank.lines[account], account.level
        line.remove(sequence)
        rank.crowd.change(account, -1)
        account.num_waiting -= 1
        level.num_waiting -= 1
        if not account.num_waiting:
            level.last = account
        if not line:
            del rank.lines[account], rank.stamps[account]
            rank.in_sight.clear()
            if not rank.lines:
                del self._ranks[sequence.level]
                self._levels.remove(sequence.level)
        self._best = None

    def _enter(self, rank: _Rank, account: Account, *, is_back: bool) -> None:
        """A tenant begins to wait; with a preempted sequence, before those of equal counters."""
        self._meter.watch()
        rank.in_sight.clear()
        self._stamp += 1
        stamp = rank.stamps[account] = -self._stamp if is_back else self._stamp
        heapq.heappush(rank.heap, (account.counter, stamp, account))
        if len(rank.heap) > 2 * len(rank.lines) + 64:
            rank.heap = [entry for entry in rank.heap if rank.stamps.get(entry[2]) == entry[1]]
            heapq.heapify(rank.heap)

    def _top(self, rank: _Rank) -> Account | None:
        """The account with the least counter; brings the heap up to date as far as needed."""
        heap = rank.heap
        while heap:
            counter, stamp, account = heap[0]
            if rank.stamps.get(account) != stamp:
                heapq.heappop(heap)
                continue
            now = account.counter
            if now <= counter:
                return account
            heapq.heapreplace(heap, (now, stamp, account))
        return None

    def _nearest(self, rank: _Rank, top: Account) -> Sequence:
        """With locality: the longest cached prefix near the fronts of tenants with a deficit."""
        if not self._has_deficit(rank, top):
            rank.mark = top.counter
            rank.in_sight.clear()
        if rank.seen_in != self._num_looks:
            rank.seen_in = self._num_looks
            rank.in_sight.clear()
        lines, looks = rank.lines, self._num_looks
        first = lines[top]
        if first.num_passed >= MAX_PASSED:
            return first.first()
        while True:
            if not rank.in_sight:
                self._look_around(rank)
            longest, best = self._nearest_of(first)
            for account in rank.in_sight:
                known = lines[account].nearest
                if known is None or known[0] != looks:
                    num_cached, sequence = self._nearest_of(lines[account])
                else:
                    num_cached, sequence = known[1]
                if num_cached > longest:
                    longest, best = num_cached, sequence
            if best.account is top or self._has_deficit(rank, _account(best)):
                return best
            rank.in_sight.clear()  # it was served since they were looked for

    def _look_around(self, rank: _Rank) -> None:
        """Brings the least tenants with a deficit into sight."""
        taken = []
        for _ in range(NUM_TENANTS_SEEN):
            account = self._top(rank)
            if account is None:
                break
            taken.append(heapq.heappop(rank.heap))
            if self._has_deficit(rank, account):  # if not, one of less weight may have some
                rank.in_sight.append(account)
        for entry in taken:
            heapq.heappush(rank.heap, entry)

    def _nearest_of(self, line: Line) -> tuple[int, Sequence]:
        """The longest cached prefix near a tenant's front, and whose it is.

        Looked up once in a plan: pages become findable between plans, and what a plan evicts
        matters to the order only.
        """
        if line.nearest is not None and line.nearest[0] == self._num_looks:
            return line.nearest[1]
        cached, longest, best = self._cached, -1, None
        for sequence in line.front(NUM_FRONT_SEEN):
            num_cached = cached.get(sequence)
            if num_cached is None:
                num_cached = self._num_cached(sequence)
            if num_cached > longest:
                longest, best = num_cached, sequence
        assert best is not None, "nobody stands in the line"
        line.nearest = self._num_looks, (longest, best)
        return longest, best

    def _num_cached(self, sequence: Sequence) -> int:
        """Its cached tokens as this look finds them."""
        num_cached = self._cached.get(sequence)
        if num_cached is None:
            num_cached = self._cached[sequence] = self._cached_tokens(sequence)
        return num_cached

    def _has_deficit(self, rank: _Rank, account: Account) -> bool:
        return account.counter < rank.mark + self._quantum / account.weight

    def _is_due(self, age: tuple[int, int, Sequence]) -> bool:
        """Whether an age is of a sequence that still waits the wait that it was noted for."""
        due_ns, _, sequence = age
        return (
            sequence in self._entries
            and sequence.level != AGED
            and due_ns == sequence.waits_since_ns + self._longest_wait_ns - sequence.waited_ns
        )


def _account(sequence: Sequence) -> Account:
    account = sequence.account
    assert account is not None, "the sequence was never let in"
    return account
