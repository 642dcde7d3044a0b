"""Virtual token counters: what each tenant has been served within a priority, and who is due next.

A tenant's counter grows by the price of each input token when a sequence of it is let in, and by
the price of each output token when that is launched, both divided by the tenant's weight. The
waiting tenant with the least counter is served next ("Fairness in Serving Large Language Models",
arXiv 2401.00588). A tenant that comes back is lifted to the least counter of those that wait, or of
the last one that did, so that nobody saves up credit by being idle. What is cancelled stays
charged; what is computed again after a preemption, or found in a cache, is not charged. Where a
sequence finds something only after it was charged for it, since another was ahead with the same
prompt, its tenant's next prompts are charged that much less. So a counter never falls, which the
queue and the bound rely on.

Counters belong to a level: a priority, or the sequences that have waited too long. They are shared
by the copies of the model; each copy has a `Meter` that knows its running rows. Nobody visits rows
that go on: a counter is what was settled plus, for each copy, decoding rows × decode steps since.

Invariant: while sequences of a level wait in a copy, no tenant that runs there has more than
`Accounts.bound` / weight above the least counter of those that wait. New service goes to the least
counter only, which keeps it almost always; where rows let in long ago would break it all the same,
`Meter.over_bound` names them, and they are set back. Hence the gap of weighted service between two
tenants that both wait is never more than the bound over one weight plus the bound over the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.sequence import Sequence

#: Idle accounts are looked for when there are so many more than at the last look.
SPARE_ACCOUNTS = 1024


@dataclass(slots=True, eq=False)
class Account:
    """A tenant at one level.

    Attributes:
        weight: its share; twice the weight is served twice as much.
        settled: the counter, without what running rows have brought since they were last settled.
        tallies: by copy, rows that run.
        credit: price of what was charged and then found in a cache.
        num_waiting: sequences in queues, of all copies.
    """

    tenant: str
    level: Level
    weight: float = 1.0
    settled: float = 0.0
    tallies: dict[Meter, Tally] = field(default_factory=dict)
    credit: float = 0.0
    num_waiting: int = 0

    @property
    def counter(self) -> float:
        """Weighted service so far."""
        if not self.tallies:
            return self.settled
        pending = 0
        for meter, tally in self.tallies.items():
            pending += len(tally.decoding) * (meter.clock - tally.since)
        return self.settled + pending * self.level.accounts.output_price / self.weight

    def settle(self) -> None:
        """Brings `settled` up to now, before the number of rows or the weight changes."""
        pending = 0
        for meter, tally in self.tallies.items():
            pending += len(tally.decoding) * (meter.clock - tally.since)
            tally.since = meter.clock
        if pending:
            self.settled += pending * self.level.accounts.output_price / self.weight


@dataclass(slots=True, eq=False)
class Tally:
    """A tenant's running rows in one copy.

    Attributes:
        since: the copy's clock when the account was last settled.
        running: sequences that hold a slot; decoding: those of them that decode.
    """

    since: int
    running: dict[Sequence, None] = field(default_factory=dict)
    decoding: dict[Sequence, None] = field(default_factory=dict)


class Backlog(Protocol):
    """A copy's waiting queue, as accounts see it."""

    def least(self, level: int) -> float | None:
        """The least counter of a tenant that waits there at a level; None if nobody does."""
        ...


@dataclass(slots=True, eq=False)
class Level:
    """The tenants of one level.

    Attributes:
        floor: what a tenant that comes back is lifted to; never falls.
        last: the tenant that was the last to leave the queues.
        num_waiting: sequences in queues, of all copies.
    """

    number: int
    accounts: Accounts
    tenants: dict[str, Account] = field(default_factory=dict)
    floor: float = 0.0
    last: Account | None = None
    num_waiting: int = 0
    purge_at: int = SPARE_ACCOUNTS

    def lift(self, account: Account) -> None:
        """A tenant begins to wait: its counter is brought up to those of the others that wait."""
        counters = (queue.least(self.number) for queue in self.accounts.backlogs)
        waiting = [counter for counter in counters if counter is not None]
        if waiting:
            self.floor = max(self.floor, min(waiting))
        else:
            if self.last is not None:
                self.floor = max(self.floor, self.last.counter)
            # Rows that run while nobody waits are not held back: what they have got by now must
            # not be a gap when somebody does.
            for running in self._running():
                ahead = self.accounts.bound / (2 * running.weight)
                self.floor = max(self.floor, running.counter - ahead)
        account.settle()
        account.settled = max(account.settled, self.floor)

    def purge(self) -> None:
        """Forgets tenants that would come back at the floor anyway."""
        if len(self.tenants) < self.purge_at:
            return
        busy = set(self._running())
        self.tenants = {
            tenant: account
            for tenant, account in self.tenants.items()
            if account.num_waiting
            or account in busy
            or account is self.last
            or account.settled > self.floor
        }
        self.purge_at = 2 * len(self.tenants) + SPARE_ACCOUNTS

    def _running(self) -> Iterator[Account]:
        for meter in self.accounts.meters:
            for account in meter.tallies:
                if account.level is self:
                    yield account


class Accounts:
    """The counters of all levels, shared by the copies of the model.

    Args:
        config: prices and which fairness; "fcfs" has one account for all tenants.

    Attributes:
        capacity_tokens: that the page pools hold, of all copies.
        longest_prompt: let in so far.
        backlogs, meters: of the copies.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.input_price = config.input_token_price
        self.output_price = config.output_token_price
        self.capacity_tokens = 0
        self.longest_prompt = 0
        self.backlogs: list[Backlog] = []
        self.meters: list[Meter] = []
        self._levels: dict[int, Level] = {}
        self._one_for_all = config.fairness == "fcfs"
        self._quantum = config.locality_quantum_tokens if config.fairness == "locality" else 0

    @property
    def bound(self) -> float:
        """How far a counter of weight 1 may get above the least one of those that wait."""
        served = max(
            self.input_price * self.longest_prompt, self.output_price * self.capacity_tokens
        )
        return served + self._quantum

    def account(self, level: int, tenant: str, weight: float) -> Account:
        """A tenant's account at a level, opened if need be; the last weight given counts."""
        if self._one_for_all:
            tenant, weight = "", 1.0
        known = self._levels.get(level)
        if known is None:
            known = self._open(level)
        account = known.tenants.get(tenant)
        if account is None:
            known.purge()
            account = known.tenants[tenant] = Account(tenant, known, weight)
        elif account.weight != weight:
            account.settle()
            account.weight = weight
            for meter in self.meters:
                meter.watch()
        return account

    def _open(self, number: int) -> Level:
        if len(self._levels) >= SPARE_ACCOUNTS:  # a client that makes priorities up
            busy = {account.level.number for meter in self.meters for account in meter.tallies}
            self._levels = {
                n: level for n, level in self._levels.items() if level.num_waiting or n in busy
            }
        level = self._levels[number] = Level(number, self)
        return level


class Meter:
    """Charges what runs in one copy of the model.

    Attributes:
        clock: decode steps launched so far.
        tallies: rows that run, by account.
    """

    def __init__(self, accounts: Accounts, capacity_tokens: int) -> None:
        self.clock = 0
        self.tallies: dict[Account, Tally] = {}
        self._accounts = accounts
        # What all accounts together can be served, each by its weight, before one of them can
        # come near the bound.
        self._slack = -math.inf
        self._slack_clock = 0
        self._least_weight = 1.0
        self._num_running = 0
        self._most_running = 0  # since `_slack_clock`
        accounts.capacity_tokens += capacity_tokens
        accounts.meters.append(self)

    def admit(self, sequence: Sequence) -> None:
        """A sequence has got a slot: charges the prompt tokens it will compute, the first time."""
        account = _account(sequence)
        if not sequence.is_charged:
            sequence.is_charged = True
            if sequence.prompt_len > self._accounts.longest_prompt:
                self._accounts.longest_prompt = sequence.prompt_len
            sequence.num_charged = sequence.prompt_len - sequence.num_computed
            price = sequence.num_charged * self._accounts.input_price
            if account.credit:
                from_credit = min(price, account.credit)
                account.credit -= from_credit
                price -= from_credit
            self._charge(account, price)
        tally = self.tallies.get(account)
        if tally is None:
            tally = self.tallies[account] = account.tallies[self] = Tally(self.clock)
            self.watch()
        tally.running[sequence] = None
        self._num_running += 1
        if self._num_running > self._most_running:
            self._most_running = self._num_running
        if account.weight < self._least_weight:
            self._least_weight = account.weight
        self._slack -= self._accounts.output_price / account.weight  # it grows faster from now on

    def found(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence has found tokens in a cache; gives credit for those that were charged."""
        num_tokens = min(num_tokens, sequence.num_charged)
        if num_tokens:
            sequence.num_charged -= num_tokens
            _account(sequence).credit += num_tokens * self._accounts.input_price

    def leave(self, sequence: Sequence) -> None:
        """A sequence's slot is free."""
        account = _account(sequence)
        tally = self.tallies[account]
        del tally.running[sequence]
        self._num_running -= 1
        if not tally.running:
            assert not tally.decoding
            account.settle()
            del self.tallies[account], account.tallies[self]

    def begin(self, sequence: Sequence) -> None:
        """A sequence decodes from the next step on."""
        account = _account(sequence)
        account.settle()
        account.tallies[self].decoding[sequence] = None

    def end(self, sequence: Sequence) -> None:
        """A sequence decodes no more."""
        account = _account(sequence)
        account.settle()
        del account.tallies[self].decoding[sequence]

    def sampled(self, sequence: Sequence, num_tokens: int = 1) -> None:
        """Charges output tokens beyond those of plain decode steps.

        Those of a step with drafts are charged when they are read, since nobody knows before how
        many they are. Such steps are made only while nobody waits.
        """
        self._charge(_account(sequence), num_tokens * self._accounts.output_price)

    def watch(self) -> None:
        """A tenant waits or runs that did not, or a weight changed: who runs is to be looked at."""
        self._slack = -math.inf

    def over_bound(self, backlog: Backlog) -> list[Sequence]:
        """Decoding rows that another step would take over the bound.

        Accounts are looked at only when one could have come near it: what they are served in the
        meantime is counted for all together, which costs the same however many there are.
        """
        price, bound = self._accounts.output_price, self._accounts.bound
        decoded = (self.clock - self._slack_clock) * self._most_running
        self._slack -= decoded * price / self._least_weight
        self._slack_clock, self._most_running = self.clock, self._num_running
        # Another copy's rows are charged to the same accounts.
        if self._slack > 0 and len(self._accounts.meters) == 1:
            return []
        rows: list[Sequence] = []
        self._slack = math.inf
        levels = {account.level.number for account in self.tallies}
        least_of = {level: backlog.least(level) for level in levels}
        for account, tally in self.tallies.items():
            least = least_of[account.level.number]
            if least is None:
                continue
            rate = len(tally.running) * price / account.weight
            room = least + bound / account.weight - account.counter
            if room < rate:
                rows += tally.decoding
            self._slack = min(self._slack, room - rate)
        self._least_weight = min((account.weight for account in self.tallies), default=1.0)
        return rows

    def _charge(self, account: Account, price: float) -> None:
        account.settled += price / account.weight
        self._slack -= price / account.weight


def _account(sequence: Sequence) -> Account:
    account = sequence.account
    assert account is not None, "the sequence was never let in"
    return account
