"""LoRA adapters in the slots of one copy of the model: which is where, and who waits for a slot.

Slots come in classes by rank; a class's slots hold its adapters, the least recently used one gives
way. An adapter is pinned by the sequences that hold a row with it. Where all slots of a class are
pinned, a sequence with another adapter is *parked*: taken out of the queue, so that nobody behind
it waits for it. When a slot can be had, the parked sequences of the best rank go back to the queue,
to their old places.

So that popular adapters do not keep the others waiting for ever, one slot of a class that somebody
is parked for is *draining*: no more sequences join it, and its last one frees it. A parked sequence
waits at most as long as the sequences of one slot run, once for each adapter that is parked before.

Invariants: a pinned adapter is never moved or overwritten. A slot is written by the plan in which
the first sequence joins with it, so in device order before that sequence's first step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jaxserve.scheduler.plan import AdapterLoad, Plan
from jaxserve.scheduler.sequence import Sequence, SequenceState

NO_SLOT = -1


@dataclass(slots=True)
class _Class:
    """Slots of one rank, numbered from `first`.

    Attributes:
        free: that hold nothing.
        held: slot of each adapter, the least recently used first.
        pins: sequences with a row, by adapter; none are not listed.
        parked: sequences that wait, by adapter.
        draining: an adapter that nobody may join; empty for none.
    """

    free: list[int]
    held: OrderedDict[str, int] = field(default_factory=OrderedDict)
    pins: dict[str, int] = field(default_factory=dict)
    parked: dict[str, dict[Sequence, None]] = field(default_factory=dict)
    draining: str = ""

    @property
    def num_takable(self) -> int:
        """Slots that another adapter could have."""
        return len(self.free) + len(self.held) - len(self.pins)

    def may_join(self, key: str) -> bool:
        """Whether a sequence could take a row with this adapter now."""
        if key in self.held:
            return key != self.draining
        return self.num_takable > 0

    def take(self, key: str) -> tuple[int, bool]:
        """The adapter's slot, given to it now if need be; and whether it was there."""
        slot = self.held.pop(key, None)
        was_there = slot is not None
        if slot is None:
            slot = self.free.pop() if self.free else self._evict()
        self.held[key] = slot
        self.pins[key] = self.pins.get(key, 0) + 1
        return slot, was_there

    def leave(self, key: str) -> None:
        """A sequence gives its row up."""
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]
            if key == self.draining:
                self.draining = ""

    def park(self, key: str, sequence: Sequence) -> None:
        """A sequence waits for a slot."""
        self.parked.setdefault(key, {})[sequence] = None
        if not self.draining and self.pins:
            self.draining = min(self.pins, key=lambda pinned: self.pins[pinned])

    def release(self) -> Iterator[Sequence]:
        """Parked sequences that may take a slot now, those of the best rank first."""
        left = self.num_takable
        for key in sorted(self.parked, key=lambda key: min(s.rank for s in self.parked[key])):
            if key in self.held:
                if key == self.draining:
                    continue
            elif left == 0:
                continue
            else:
                left -= 1
            yield from self.parked.pop(key)
        if not self.parked:
            self.draining = ""

    def _evict(self) -> int:
        key = next(key for key in self.held if key not in self.pins)
        return self.held.pop(key)


class AdapterTable:
    """The slots of one copy; see the module.

    Args:
        num_slots: of each class; empty where there are no adapters.

    Attributes:
        num_parked: sequences that wait for a slot.
        num_joins: rows that were taken with an adapter, so far.
        num_hits: of these, those whose adapter was in a slot.
    """

    def __init__(self, num_slots: Iterable[int] = ()) -> None:
        self.num_parked = 0
        self.num_joins = 0
        self.num_hits = 0
        self._classes: list[_Class] = []
        first = 0
        for count in num_slots:
            self._classes.append(_Class(free=list(range(first + count - 1, first - 1, -1))))
            first += count
        self._loads: list[AdapterLoad] = []

    @property
    def num_held(self) -> int:
        """Adapters in slots."""
        return sum(len(own.held) for own in self._classes)

    def holds(self, sequence_class: int, key: str) -> bool:
        """Whether an adapter is in a slot."""
        return key in self._classes[sequence_class].held

    def may_join(self, sequence: Sequence) -> bool:
        """Whether a sequence could take a row now, as far as its adapter goes."""
        use = sequence.adapter
        return use is None or self._classes[use.rank_class].may_join(use.key)

    def join(self, sequence: Sequence) -> None:
        """A sequence takes a row: its `adapter_slot` holds its adapter from the next plan on."""
        use = sequence.adapter
        if use is None:
            return
        sequence.adapter_slot, was_there = self._classes[use.rank_class].take(use.key)
        self.num_joins += 1
        self.num_hits += was_there
        if not was_there:
            self._loads.append(AdapterLoad(slot=sequence.adapter_slot, key=use.key))

    def leave(self, sequence: Sequence) -> None:
        """A sequence gives its row up."""
        use = sequence.adapter
        if use is not None:
            self._classes[use.rank_class].leave(use.key)
            sequence.adapter_slot = NO_SLOT

    def tell(self, plan: Plan) -> None:
        """Adds the writes that the plan's joins need."""
        if self._loads:
            plan.adapter_loads += self._loads
            self._loads = []

    def park(self, sequence: Sequence) -> None:
        """A sequence that `may_join` refused, and that is in no queue, waits here."""
        use = sequence.adapter
        assert use is not None
        self._classes[use.rank_class].park(use.key, sequence)
        sequence.state = SequenceState.PARKED
        self.num_parked += 1

    def withdraw(self, sequence: Sequence) -> None:
        """A parked sequence waits no more."""
        use = sequence.adapter
        assert use is not None
        parked = self._classes[use.rank_class].parked
        del parked[use.key][sequence]
        if not parked[use.key]:
            del parked[use.key]
        self.num_parked -= 1

    def release(self) -> list[Sequence]:
        """Parked sequences that a plan may let in: they are to go back to the queue."""
        if not self.num_parked:
            return []
        released = [sequence for own in self._classes for sequence in own.release()]
        self.num_parked -= len(released)
        for sequence in released:
            sequence.state = SequenceState.WAITING
        return released
