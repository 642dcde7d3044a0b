"""Where the state of all buckets is kept: the protocol of stores, and the one in memory.

A *reservation* takes units from several buckets at once, all or nothing, under an id of the
caller's. It is settled exactly once: by its owner, who says what was used, or by the store when its
lease ends, with what the owner last said. A *ticket* remembers a promised slot under the request's
fingerprint, so that a client needs nothing but to send the same request again.

`MemoryStore` serves one process by itself, several through `limits.owner`; `limits.redis_store` is
the same for several servers.

Invariants: units are taken when a request is let in or its slot begins, never twice for one id;
memory is bounded by `MAX_ACCOUNTS` and `MAX_TICKETS`, and what is idle is forgotten.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxserve.limits.bucket import HORIZON_S, SLOT_S, Account, Bucket, expires_s, spread_s

#: A reservation that nobody has renewed for so long is settled by the store.
LEASE_S = 60.0
#: Accounts of buckets that are not full; beyond it the one unused longest is forgotten.
MAX_ACCOUNTS = 200_000
#: Slots that may be promised at once; beyond it a refusal tells a time but keeps no place.
MAX_TICKETS = 100_000
#: Idle accounts and ended leases looked at in one operation.
_SWEEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """What a request wants.

    Attributes:
        id: of the reservation, unique for ever.
        buckets, units: aligned; all must have the units, or none is touched.
        fingerprint: the same when the same request is sent again, and only then.
        again: the client says that it is a repetition: a slot it holds is told, no other promised.
    """

    id: str
    buckets: tuple[Bucket, ...]
    units: tuple[float, ...]
    fingerprint: bytes
    again: bool = False


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a store says.

    Attributes:
        granted: whether the units are taken.
        units: reserved now, by bucket: of a promised slot, what was promised.
        levels: left in each bucket.
        culprit: index of the bucket that refused, -1 where granted.
        retry_after_s: when to come again; inf: never, since it is more than the burst.
        promised: whether a slot is kept until then.
    """

    granted: bool
    units: list[float]
    levels: list[float]
    culprit: int = -1
    retry_after_s: float = 0.0
    promised: bool = False


class StoreFailure(Exception):
    """The store cannot be reached, or did not answer in time."""


class Store(Protocol):
    """Keeps buckets. Every method may raise `StoreFailure`."""

    async def take(self, take: Take) -> Answer:
        """Reserves, or promises a slot. Taking the same id again changes nothing."""
        ...

    async def change(self, take: Take) -> Answer:
        """Sets the units of the reservation `take.id` anew.

        Less always succeeds. If more does not fit, the whole reservation is given back and a slot
        for the new units is promised.
        """
        ...

    async def renew(self, used: dict[str, list[float]]) -> None:
        """Extends leases, by id with the units used so far; more than reserved becomes debt."""
        ...

    async def settle(self, id: str, used: list[float]) -> None:
        """Gives back what was not used, once; an unknown id is ignored."""
        ...

    async def close(self) -> None:
        """Lets go of connections."""
        ...


@dataclass(slots=True)
class _Reservation:
    buckets: tuple[Bucket, ...]
    units: list[float]
    used: list[float]
    ends_s: float


#: A promised slot and its units; those of one fingerprint are a heap.
_Ticket = tuple[int, tuple[float, ...]]


class MemoryStore:
    """The store of one process; its methods are synchronous, `LocalStore` makes them a `Store`.

    Args:
        clock_s: seconds, monotonic.
        lease_s: of reservations.
    """

    def __init__(
        self, clock_s: Callable[[], float] = time.monotonic, lease_s: float = LEASE_S
    ) -> None:
        self._clock_s = clock_s
        self._lease_s = lease_s
        self._accounts: OrderedDict[str, tuple[Bucket, Account]] = OrderedDict()
        self._reservations: OrderedDict[str, _Reservation] = OrderedDict()  # by end of lease
        self._tickets: dict[bytes, list[_Ticket]] = {}
        self._ticket_ends: list[tuple[float, bytes]] = []

    @property
    def num_accounts(self) -> int:
        """Accounts in memory."""
        return len(self._accounts)

    @property
    def num_reservations(self) -> int:
        """Reservations that are not settled."""
        return len(self._reservations)

    def take(self, take: Take) -> Answer:
        """See `Store`."""
        now_s = self._clock_s()
        self._sweep(now_s)
        return self._take(take, now_s)

    def change(self, take: Take) -> Answer:
        """See `Store`."""
        now_s = self._clock_s()
        self._sweep(now_s)
        reservation = self._reservations.get(take.id)
        if reservation is None:  # its lease ended
            return self._take(take, now_s)
        accounts = [self._account(bucket, now_s) for bucket in take.buckets]
        more = tuple(new - old for new, old in zip(take.units, reservation.units, strict=True))
        never = _impossible(take)
        culprit = _refusing(take, more, accounts) if never is None else never
        if culprit is not None:
            self.settle(take.id, [0.0] * len(more))
            if never is not None:
                return _refused(never, accounts, float("inf"))
            return self._promise(take, culprit, accounts, now_s)
        for bucket, account, units in zip(take.buckets, accounts, more, strict=True):
            _charge(bucket, account, units)
        reservation.units = list(take.units)
        reservation.ends_s = now_s + self._lease_s
        self._reservations.move_to_end(take.id)
        return _granted(reservation.units, accounts)

    def renew(self, used: dict[str, list[float]]) -> None:
        """See `Store`."""
        now_s = self._clock_s()
        for id, units in used.items():
            reservation = self._reservations.get(id)
            if reservation is None:
                continue
            for index, bucket in enumerate(reservation.buckets):
                over = units[index] - reservation.units[index]
                if over > 0:
                    self._account(bucket, now_s).take(bucket, over)
                    reservation.units[index] = units[index]
            reservation.used = list(units)
            reservation.ends_s = now_s + self._lease_s
            self._reservations.move_to_end(id)

    def settle(self, id: str, used: list[float] | None = None) -> None:
        """See `Store`; without `used`, with what was last renewed."""
        reservation = self._reservations.pop(id, None)
        if reservation is None:
            return
        now_s = self._clock_s()
        used = reservation.used if used is None else used
        for bucket, reserved, spent in zip(
            reservation.buckets, reservation.units, used, strict=True
        ):
            _charge(bucket, self._account(bucket, now_s), spent - reserved)

    def _take(self, take: Take, now_s: float) -> Answer:
        accounts = [self._account(bucket, now_s) for bucket in take.buckets]
        known = self._reservations.get(take.id)
        if known is not None:
            return _granted(known.units, accounts)
        culprit = _impossible(take)
        if culprit is not None:
            return _refused(culprit, accounts, float("inf"))
        ticket = self._claim(take, now_s)
        if ticket is not None:
            slot, promised = ticket
            for account, units in zip(accounts, promised, strict=True):
                account.claim(slot, units)
            return self._reserve(take, promised, accounts, now_s)
        culprit = _refusing(take, take.units, accounts)
        if culprit is not None:
            return self._promise(take, culprit, accounts, now_s)
        for bucket, account, units in zip(take.buckets, accounts, take.units, strict=True):
            account.take(bucket, units)
        return self._reserve(take, take.units, accounts, now_s)

    def _reserve(
        self, take: Take, units: tuple[float, ...], accounts: list[Account], now_s: float
    ) -> Answer:
        # A request counts from the start, tokens only once they are known to be used.
        used = [float(u if b.kind == "requests" else 0) for b, u in zip(take.buckets, units)]  # noqa: B905
        self._reservations[take.id] = _Reservation(
            take.buckets, list(units), used, now_s + self._lease_s
        )
        return _granted(list(units), accounts)

    def _promise(self, take: Take, culprit: int, accounts: list[Account], now_s: float) -> Answer:
        tickets = self._tickets.get(take.fingerprint)
        if take.again and tickets:
            wait_s = max(0.0, tickets[0][0] * SLOT_S - now_s)
            return _refused(culprit, accounts, wait_s, promised=True)
        slot = common_slot(take, accounts, now_s)
        # Those who share a slot come one after another in it.
        wait_s = slot * SLOT_S - now_s
        promised = wait_s <= HORIZON_S and len(self._ticket_ends) < MAX_TICKETS
        if promised:
            before = [
                account.promise(bucket, slot, units)
                for bucket, account, units in zip(take.buckets, accounts, take.units, strict=True)
            ]
            scarce = take.buckets[culprit]
            wait_s += spread_s(slot, before[culprit], take.units[culprit], scarce, now_s)
            heapq.heappush(self._tickets.setdefault(take.fingerprint, []), (slot, take.units))
            heapq.heappush(self._ticket_ends, (expires_s(slot), take.fingerprint))
        return _refused(culprit, accounts, wait_s, promised=promised)

    def _claim(self, take: Take, now_s: float) -> _Ticket | None:
        """The request's promised slot, if it has begun."""
        tickets = self._tickets.get(take.fingerprint)
        if not tickets or tickets[0][0] * SLOT_S > now_s or len(tickets[0][1]) != len(take.units):
            return None
        ticket = heapq.heappop(tickets)
        if not tickets:
            del self._tickets[take.fingerprint]
        return ticket

    def _account(self, bucket: Bucket, now_s: float) -> Account:
        entry = self._accounts.get(bucket.name)
        if entry is None:
            account = Account(bucket.burst, now_s)
            if len(self._accounts) >= MAX_ACCOUNTS:
                self._accounts.popitem(last=False)
        else:
            account = entry[1]
            account.advance(bucket, now_s)
        self._accounts[bucket.name] = (bucket, account)
        self._accounts.move_to_end(bucket.name)
        return account

    def _sweep(self, now_s: float) -> None:
        """Forgets some of what is over: tickets, leases, and accounts that are full."""
        ends = self._ticket_ends
        while ends and ends[0][0] <= now_s:
            _, fingerprint = heapq.heappop(ends)
            tickets = self._tickets.get(fingerprint, [])
            while tickets and expires_s(tickets[0][0]) <= now_s:
                heapq.heappop(tickets)
            if not tickets:
                self._tickets.pop(fingerprint, None)
        for _ in range(_SWEEP):
            if not self._reservations:
                break
            id, reservation = next(iter(self._reservations.items()))
            if reservation.ends_s > now_s:
                break
            self.settle(id)
        for _ in range(_SWEEP):
            if not self._accounts:
                break
            name, (bucket, account) = next(iter(self._accounts.items()))
            if account.is_idle(bucket, now_s):
                del self._accounts[name]
            else:
                self._accounts.move_to_end(name)


class LocalStore:
    """A `MemoryStore` of this process as a `Store`."""

    def __init__(self, memory: MemoryStore | None = None) -> None:
        self._memory = memory or MemoryStore()

    async def take(self, take: Take) -> Answer:
        """See `Store`."""
        return self._memory.take(take)

    async def change(self, take: Take) -> Answer:
        """See `Store`."""
        return self._memory.change(take)

    async def renew(self, used: dict[str, list[float]]) -> None:
        """See `Store`."""
        self._memory.renew(used)

    async def settle(self, id: str, used: list[float]) -> None:
        """See `Store`."""
        self._memory.settle(id, used)

    async def close(self) -> None:
        """See `Store`."""


def common_slot(take: Take, accounts: list[Account], now_s: float) -> int:
    """The first slot in which every bucket has the units."""
    slot = int(now_s / SLOT_S) + 1
    agreed = index = 0
    while agreed < len(accounts) and slot * SLOT_S - now_s <= HORIZON_S:
        wanted = slot
        if take.units[index] > 0:
            slot = accounts[index].earliest(take.buckets[index], take.units[index], slot)
        agreed = agreed + 1 if slot == wanted else 1
        index = (index + 1) % len(accounts)
    return slot


def _charge(bucket: Bucket, account: Account, units: float) -> None:
    if units > 0:
        account.take(bucket, units)
    else:
        account.give(bucket, -units)


def _granted(units: list[float], accounts: list[Account]) -> Answer:
    return Answer(granted=True, units=list(units), levels=[account.left for account in accounts])


def _refused(
    culprit: int, accounts: list[Account], retry_after_s: float, *, promised: bool = False
) -> Answer:
    return Answer(
        granted=False,
        units=[0.0] * len(accounts),
        levels=[account.left for account in accounts],
        culprit=culprit,
        retry_after_s=retry_after_s,
        promised=promised,
    )


def _impossible(take: Take) -> int | None:
    """Index of the first bucket that could not give the units even if it were full."""
    for index, (bucket, units) in enumerate(zip(take.buckets, take.units, strict=True)):
        if units > bucket.burst:
            return index
    return None


def _refusing(take: Take, units: tuple[float, ...], accounts: list[Account]) -> int | None:
    """Index of the first bucket in which the units do not fit."""
    for index, (bucket, account) in enumerate(zip(take.buckets, accounts, strict=True)):
        if not account.fits(bucket, units[index]):
            return index
    return None
