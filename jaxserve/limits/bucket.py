"""A token bucket that keeps promises: what is left now, and what has been promised for later.

A request that does not fit is promised a *slot*, a second in which its amount will fit. What is
promised is planned for: nothing is taken now that a later slot needs. When a slot's second begins,
its amount is set aside (held) outside of the bucket, so that the bucket goes on filling; it waits
there for its owner until `GRACE_S` after the slot, and then goes back. So whoever keeps to the time
is served, a slot nobody comes for is not lost, and the total taken since the start never exceeds
burst + rate × time.

`account.lua` is the same arithmetic for Redis; `tests/limits/test_redis.py` holds the two equal.

Invariants: slots are whole numbers of `SLOT_S` on the store's clock; at most `HORIZON_S` of them
exist, so every operation costs at most that many steps, however many requests were promised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Width of a slot.
SLOT_S = 1.0
#: How long after its slot an amount waits for its owner: a `Retry-After` is in whole seconds.
GRACE_S = 5.0
#: Nothing is promised for a time further away.
HORIZON_S = 600.0
#: A clock that went back further than this was set; less is waited for.
MAX_SETBACK_S = 10.0
#: Sums of fractions are off by this much.
EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One limit of somebody: what it is called in the store, and its numbers.

    Attributes:
        scope, kind: "key", "user" or "tenant"; "requests" or "tokens": for messages and metrics.
        rate: units a second.
        burst: units that a full bucket holds.
    """

    name: str
    scope: str
    kind: str
    rate: float
    burst: float


class Account:
    """The state of one bucket; see the module.

    Attributes:
        level: units that may be taken; below zero it is debt.
        at_s: the store's clock when that was so.
        slots: slot → units promised in it.
        held: slot that has begun → units set aside and not yet claimed.
    """

    __slots__ = ("at_s", "held", "level", "slots")

    def __init__(self, level: float, at_s: float) -> None:
        self.level = level
        self.at_s = at_s
        self.slots: dict[int, float] = {}
        self.held: dict[int, float] = {}

    def advance(self, bucket: Bucket, now_s: float) -> None:
        """Brings the account up to now. A clock that went back stands still, or was set anew."""
        if now_s < self.at_s - MAX_SETBACK_S:
            self.at_s = now_s
            latest = (now_s + HORIZON_S) / SLOT_S
            self.slots = {slot: units for slot, units in self.slots.items() if slot <= latest}
            self.held = {slot: units for slot, units in self.held.items() if slot <= latest}
        for slot in sorted(self.slots):
            if slot * SLOT_S > now_s:
                break
            self._fill(bucket, slot * SLOT_S)
            units = self.slots.pop(slot)
            self.level -= units
            self.held[slot] = self.held.get(slot, 0.0) + units
        self._fill(bucket, now_s)
        for slot in [slot for slot in self.held if expires_s(slot) <= now_s]:
            self.give(bucket, self.held.pop(slot))

    def fits(self, bucket: Bucket, units: float) -> bool:
        """Whether this much can be taken now without breaking a promise."""
        if units <= 0:
            return True
        level, at_s = self.level - units, self.at_s
        if level < -EPSILON:
            return False
        for slot in sorted(self.slots):
            start_s = slot * SLOT_S
            level = min(bucket.burst, level + bucket.rate * (start_s - at_s)) - self.slots[slot]
            if level < -EPSILON:
                return False
            at_s = start_s
        return True

    def earliest(self, bucket: Bucket, units: float, from_slot: int) -> int:
        """The first slot, `from_slot` or later, in which this much fits beside what is promised."""
        order = sorted(self.slots)
        needs = self._needs(bucket, order)
        level, at_s = self.level, self.at_s
        for index in range(len(order) + 1):
            last = index == len(order)
            end_s = math.inf if last else order[index] * SLOT_S
            full_s = at_s + max(0.0, units - level) / bucket.rate
            slot = max(from_slot, math.ceil(full_s / SLOT_S - EPSILON))
            start_s = slot * SLOT_S
            if start_s < end_s:
                left = min(bucket.burst, level + bucket.rate * (start_s - at_s)) - units
                if left >= -EPSILON and (
                    last
                    or min(bucket.burst, left + bucket.rate * (end_s - start_s))
                    >= needs[index] - EPSILON
                ):
                    return slot
            if not last:
                filled = min(bucket.burst, level + bucket.rate * (end_s - at_s))
                level, at_s = filled - self.slots[order[index]], end_s
        raise AssertionError("units are within the burst, so they fit behind the last slot")

    def take(self, units: float) -> None:
        """Takes units, whether or not they are there."""
        self.level -= units

    def claim(self, slot: int, units: float) -> None:
        """Its owner has come for what was set aside in a slot that has begun."""
        left = self.held.get(slot, 0.0) - units
        if left > EPSILON:
            self.held[slot] = left
        else:
            self.held.pop(slot, None)

    def give(self, bucket: Bucket, units: float) -> None:
        """Gives units back (or, below zero, makes debt)."""
        self.level = min(bucket.burst, self.level + units)

    def is_idle(self, bucket: Bucket, now_s: float) -> bool:
        """Whether forgetting the account changes nothing."""
        filled = self.level + bucket.rate * max(0.0, now_s - self.at_s)
        return filled >= bucket.burst and not self.slots and not self.held

    def _needs(self, bucket: Bucket, order: list[int]) -> list[float]:
        """For each promised slot: the level just before it that keeps it and all after it."""
        needs = [self.slots[slot] for slot in order]
        for index in range(len(order) - 2, -1, -1):
            filled = bucket.rate * SLOT_S * (order[index + 1] - order[index])
            needs[index] += max(0.0, needs[index + 1] - filled)
        return needs

    def _fill(self, bucket: Bucket, now_s: float) -> None:
        if now_s > self.at_s:
            self.level = min(bucket.burst, self.level + bucket.rate * (now_s - self.at_s))
            self.at_s = now_s


def expires_s(slot: int) -> float:
    """When what was set aside for a slot goes back."""
    return (slot + 1) * SLOT_S + GRACE_S
