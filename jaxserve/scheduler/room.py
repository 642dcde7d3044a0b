"""Room for a sequence: whether pages are free, and who is preempted if they are not.

Preempted is the worst level first, and within a level who came last. So the first of the best level
is never preempted, and always comes to its end.
"""

from __future__ import annotations

from collections.abc import Set

from jaxserve.scheduler.choices import Choices
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import SlotTable


class Room:
    """Asks for room in the pool of one copy.

    Args:
        pages: of the pool.
        choices: waiting sequences that hold pages.
        chunk_tokens: tokens that one step may bring.
    """

    def __init__(self, pages: PageAllocator, choices: Choices, chunk_tokens: int) -> None:
        self._pages = pages
        self._choices = choices
        self._chunk_tokens = chunk_tokens

    def is_for(self, sequence: Sequence, num_running: int) -> bool:
        """Whether all known tokens fit, with a page to spare for each running row.

        The spare pages let the newcomer run about a page's worth of steps before pages run out;
        without them it would be let in only to be preempted. Alone it needs no spare ones, and
        what other waiting sequences hold is taken from them.
        """
        while not self._can_hold(sequence, num_running):
            if num_running:
                return False
            if not self._choices.reclaim(sequence):
                return True  # nothing runs, nobody holds: it fits by the check at its submission
        return True

    def victims(
        self, sequence: Sequence, slots: SlotTable, exempt: Set[Sequence]
    ) -> list[Sequence]:
        """Running rows of worse levels whose slots and pages are enough to let a sequence in.

        Where they would be, but for pages that waiting sequences of worse levels hold, those lose
        them. Empty if there are too few, and nobody should be preempted for it.

        Args:
            exempt: have a chunk in the plan that is being made.
        """
        if slots.worst_level <= sequence.level:
            return []
        while True:
            victims = self._enough(sequence, slots, exempt)
            if victims or not self._choices.reclaim(sequence, above=sequence.level):
                return victims

    def _enough(
        self, sequence: Sequence, slots: SlotTable, exempt: Set[Sequence]
    ) -> list[Sequence]:
        pools = self._pages.pools
        victims: list[Sequence] = []
        leaving: list[dict[int, int]] = [{} for _ in pools]
        freed = [0] * len(pools)
        for victim in slots.worst_first(exempt, above=sequence.level):
            victims.append(victim)
            for group, pages in enumerate(victim.table.pages):
                held = pages[victim.table.num_behind[group] :]
                freed[group] += pools[group].count_freed(held, leaving[group])
            num_left = slots.num_taken - len(victims)
            if num_left == 0:
                return victims  # alone it fits, by the check at its submission
            if self._can_hold(sequence, num_left - min(freed, default=0)):
                return victims
        return []

    def _can_hold(self, sequence: Sequence, reserve: int) -> bool:
        known = len(sequence.token_ids)
        return self._pages.can_hold(sequence.table, known, self._chunk_tokens, reserve)
