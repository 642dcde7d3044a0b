"""A token bucket that keeps promises: what is left now, and what has been promised for later.

A request that does not fit is promised a *slot*, a moment at which its amount will fit. What is
promised is planned for: nothing is taken now that a later slot needs. When a slot begins, its
amount is set aside (held) outside of the bucket, so that the bucket goes on filling; it waits
there for its owner until `GRACE_S` after the slot. What nobody came for is spare: newcomers get it,
though all that fills the bucket may be promised already. So whoever keeps to the time is served, a
slot that is not used is not lost, and the total taken since the start never exceeds burst + rate ×
time. (In a window that begins later, held and spare amounts may come on top: at most a burst and
what fills in a slot and its grace.)

`account.lua` is the same arithmetic for Redis; `tests/limits/test_redis.py` holds the two equal.

Invariants: slots are whole numbers of `SLOT_S` on the store's clock, and lie within `HORIZON_S`.
`after` is never above the level that will be left after a slot; none is promised that takes it
below zero. A slot behind all others, the common case under load, is found without a search.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

#: Width of a slot; those further away than `NEAR_S` begin at whole seconds.
SLOT_S = 0.125
NEAR_S = 30.0
_FAR_SLOTS = 8
#: How long after its slot an amount waits for its owner: a `Retry-After` is in whole seconds.
GRACE_S = 6.0
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
        spare: units of slots that nobody came for.
        at_s: the store's clock when that was so.
        starts, units, after: aligned, by time: promised slots, what is promised in each, and a
            lower bound of the level that is left after it.
        held: slot that has begun → units set aside and not yet claimed.
    """

    __slots__ = ("after", "at_s", "held", "level", "spare", "starts", "units")

    def __init__(self, level: float, at_s: float) -> None:
        self.level = level
        self.spare = 0.0
        self.at_s = at_s
        self.starts: list[int] = []
        self.units: list[float] = []
        self.after: list[float] = []
        self.held: dict[int, float] = {}

    @property
    def left(self) -> float:
        """Units that are not spoken for now."""
        return self.level + self.spare

    def advance(self, bucket: Bucket, now_s: float) -> None:
        """Brings the account up to now. A clock that went back stands still, or was set anew."""
        if now_s < self.at_s - MAX_SETBACK_S:
            self.at_s = now_s
            self.starts, self.units, self.after = [], [], []
            self.held = {}
        begun = bisect_right(self.starts, now_s / SLOT_S)
        for slot, units in zip(self.starts[:begun], self.units, strict=False):
            self._fill(bucket, slot * SLOT_S)
            self.level -= units
            self.held[slot] = self.held.get(slot, 0.0) + units
        if begun:
            del self.starts[:begun], self.units[:begun], self.after[:begun]
        self._fill(bucket, now_s)
        for slot in [slot for slot in self.held if expires_s(slot) <= now_s]:
            units = self.held.pop(slot)
            owed = min(units, max(0.0, -self.level))
            self.level += owed
            self.spare = min(bucket.burst, self.spare + units - owed)
        if self.spare and not self.starts:
            self.level = min(bucket.burst, self.level + self.spare)
            self.spare = 0.0

    def fits(self, bucket: Bucket, units: float) -> bool:
        """Whether this much can be taken now without breaking a promise."""
        units -= self.spare
        return units <= 0 or self._project(bucket, self.level - units) is not None

    def earliest(self, bucket: Bucket, units: float, from_slot: int) -> int:
        """The first slot, `from_slot` or later, in which this much fits beside what is promised."""
        starts, after = self.starts, self.after
        index = len(starts)  # all slots from here on can spare the units
        while index and after[index - 1] >= units:
            index -= 1
        index = max(index, bisect_right(starts, from_slot) - 1)
        while True:
            level, at_s = (
                (after[index - 1], starts[index - 1] * SLOT_S)
                if index
                else (
                    self.level,
                    self.at_s,
                )
            )
            full_s = at_s + max(0.0, units - level) / bucket.rate
            slot = max(from_slot, math.ceil(full_s / SLOT_S - EPSILON))
            if slot * SLOT_S > self.at_s + NEAR_S:
                slot = math.ceil(slot / _FAR_SLOTS) * _FAR_SLOTS
            if index == len(starts) or slot < starts[index]:
                return slot
            index += 1

    def promise(self, bucket: Bucket, slot: int, units: float) -> float:
        """Promises units in a slot that `earliest` found.

        Returns:
            What had been promised in it before.
        """
        index = bisect_left(self.starts, slot)
        before = 0.0
        if index < len(self.starts) and self.starts[index] == slot:
            before = self.units[index]
            self.units[index] += units
        else:
            level, at_s = self.level, self.at_s
            if index:
                level, at_s = self.after[index - 1], self.starts[index - 1] * SLOT_S
            level = min(bucket.burst, level + bucket.rate * (slot * SLOT_S - at_s))
            self.starts.insert(index, slot)
            self.units.insert(index, units)
            self.after.insert(index, level)
        for later in range(index, len(self.after)):
            self.after[later] -= units
        return before

    def take(self, bucket: Bucket, units: float) -> None:
        """Takes units, whether or not they are there."""
        spare = min(self.spare, units)
        self.spare -= spare
        self.level -= units - spare
        if self.starts:
            after = self._project(bucket, self.level, in_debt=True)
            assert after is not None
            self.after = after

    def claim(self, slot: int, units: float) -> None:
        """Its owner has come for what was set aside in a slot that has begun."""
        left = self.held.get(slot, 0.0) - units
        if left > EPSILON:
            self.held[slot] = left
        else:
            self.held.pop(slot, None)

    def give(self, bucket: Bucket, units: float) -> None:
        """Gives units back."""
        self.level = min(bucket.burst, self.level + units)

    def is_idle(self, bucket: Bucket, now_s: float) -> bool:
        """Whether forgetting the account changes nothing."""
        filled = self.level + bucket.rate * max(0.0, now_s - self.at_s)
        return filled >= bucket.burst and not self.starts and not self.held

    def _project(
        self, bucket: Bucket, level: float, *, in_debt: bool = False
    ) -> list[float] | None:
        """The levels after each slot if this is the level now; None if one is below zero."""
        if level < -EPSILON and not in_debt:
            return None
        at_s, after = self.at_s, []
        for slot, units in zip(self.starts, self.units, strict=True):
            start_s = slot * SLOT_S
            level = min(bucket.burst, level + bucket.rate * (start_s - at_s)) - units
            if level < -EPSILON and not in_debt:
                return None
            after.append(level)
            at_s = start_s
        return after

    def _fill(self, bucket: Bucket, now_s: float) -> None:
        if now_s > self.at_s:
            self.level = min(bucket.burst, self.level + bucket.rate * (now_s - self.at_s))
            self.at_s = now_s


def spread_s(slot: int, before: float, units: float, bucket: Bucket, now_s: float) -> float:
    """How long after a slot's begin one of those who share it should come, behind the others."""
    width_s = SLOT_S if slot * SLOT_S <= now_s + NEAR_S else SLOT_S * _FAR_SLOTS
    return width_s * before / max(bucket.rate * width_s, before + units)


def expires_s(slot: int) -> float:
    """When what was set aside for a slot goes back."""
    return (slot + 1) * SLOT_S + GRACE_S
