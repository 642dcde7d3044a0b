"""The sequences of one copy of the model: where each is, and what it holds there.

              PARKED
                ⇅
    HELD ─▶ WAITING ─▶ PREFILLING ⇄ DECODING ⇄ DRAFTING ─▶ RETIRED ─▶ FINISHED
               ▲            └──────────┴──────────┘
               └─────────────── set back

A plan moves sequences forward (`scheduler.planner`); here is how they leave: with their last token
launched, set back to the queue, or ended, from wherever they are.

Invariants: a sequence is in exactly one of the collections below, or in none once it is RETIRED or
FINISHED. Who holds a slot is PREFILLING, DECODING or DRAFTING.
"""

from __future__ import annotations

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.accounts import Meter
from jaxserve.scheduler.adapters import AdapterTable
from jaxserve.scheduler.choices import Choices
from jaxserve.scheduler.decoding import DecodeSet
from jaxserve.scheduler.drafting import DraftSet
from jaxserve.scheduler.opening import OpenedAhead
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.prefix import PrefixCache
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.scheduler.slots import SlotTable
from jaxserve.scheduler.swap import Swap


class Rows:
    """Who waits, who runs; see the module.

    Args:
        pages, prefix, swap: of this copy.
        waiting: its queue.
        meter: charges the tenants of who runs.

    Attributes:
        choices: further choices of requests, that wait for the first one's prompt.
        prefilling: sequences with a slot, some of whose known tokens are not computed.
        decoding, drafting: those with all known tokens launched.
        ahead: of those that decode, whose next page was taken ahead.
        slots: who holds which.
        adapters: in their own slots, and who is PARKED for one.
        num_preemptions: so far.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pages: PageAllocator,
        prefix: PrefixCache,
        swap: Swap,
        waiting: WaitingQueue,
        meter: Meter,
        adapters: AdapterTable,
    ) -> None:
        self.adapters = adapters
        self.pages = pages
        self.prefix = prefix
        self.swap = swap
        self.waiting = waiting
        self.meter = meter
        self.choices = Choices(pages, waiting)
        self.prefilling: dict[Sequence, None] = {}
        self.decoding = DecodeSet(pages.page_size, meter)
        self.ahead = OpenedAhead(self.decoding, pages)
        self.drafting = DraftSet(config, self.decoding, pages)
        self.slots = SlotTable(config.max_rows, meter)
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no slot and have not ended."""
        return len(self.waiting) + self.choices.num_held + self.adapters.num_parked

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return self.slots.num_taken

    def retire(self) -> None:
        """Lets go of rows whose last token is launched."""
        for sequence in self.decoding.done():
            self._stop_decoding(sequence)
            self._leave_slot(sequence)
            sequence.state = SequenceState.RETIRED

    def end(self, sequence: Sequence) -> None:
        """Takes an ended sequence out of wherever it is and settles its counts."""
        state = sequence.state
        if state is SequenceState.HELD:
            self.choices.desert(sequence)
        elif state in (SequenceState.WAITING, SequenceState.PARKED):
            if state is SequenceState.PARKED:
                self.adapters.withdraw(sequence)
            else:
                self.waiting.remove(sequence)
            self.choices.leaves_queue(sequence)
            self.pages.release(sequence.table)
            self.swap.drop(sequence)
        elif state is SequenceState.PREFILLING:
            del self.prefilling[sequence]
            self._leave_slot(sequence)
        elif state in (SequenceState.DECODING, SequenceState.DRAFTING):
            self._stop_decoding(sequence)
            self._leave_slot(sequence)
        sequence.state = SequenceState.FINISHED
        stop_tokens = int(sequence.stop_token_id is not None)
        sequence.num_discarded += max(sequence.num_planned - sequence.num_outputs - stop_tokens, 0)
        self.choices.lead(sequence.followers)

    def set_back(self, sequence: Sequence) -> None:
        """Back to the queue, at its old place; its pages go to the host or are computed again."""
        if sequence.state is SequenceState.PREFILLING:
            del self.prefilling[sequence]
        else:
            self._stop_decoding(sequence)
        self.swap.set_back(sequence)
        self.slots.leave(sequence)
        self.adapters.leave(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.state = SequenceState.WAITING
        self.waiting.push(sequence)

    def park(self, sequence: Sequence) -> None:
        """A sequence in the queue waits for a slot for its adapter instead; it keeps its pages."""
        self.waiting.remove(sequence)
        self.adapters.park(sequence)

    def unpark(self) -> None:
        """Those for whose adapters there may be a slot now go back to the queue."""
        for sequence in self.adapters.release():
            self.waiting.push(sequence)

    def _stop_decoding(self, sequence: Sequence) -> None:
        """Takes out a row whose known tokens are launched: one that decodes or drafts."""
        decodes = sequence.state is SequenceState.DECODING
        (self.decoding if decodes else self.drafting).remove(sequence)
        known = min(len(sequence.token_ids), sequence.num_computed)
        self.prefix.register(sequence, known)

    def _leave_slot(self, sequence: Sequence) -> None:
        self.pages.release(sequence.table)
        self.slots.leave(sequence)
        self.adapters.leave(sequence)
