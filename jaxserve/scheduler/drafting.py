"""The drafting rows: sequences whose next tokens are guessed, and verified several at a time.

A drafting row is none of the decoding rows. Its drafts can only be made when its last token has
been read: it waits until nothing of it is unread, is planned with drafts, and waits again. All
drafting rows are planned together.

- A decoding row comes here when its text foretells the next tokens (`drafts`) and drafting promises
  more tokens a second of all rows together (`draft_costs`). What is launched and unread must come
  as foretold, too, which is priced in; so free text seldom gets here.
- Drafting rows go back to decoding when nothing is foretold any more, when it does not pay, and
  when anybody waits or has a prompt to compute. So speculation ends by itself as the load grows;
  and it is never done with more rows than `scheduler.draft_rows`.
- Decoding rows beside go on while a verification is read, so that a drafting row then has a step in
  every other call only. Without any, nothing is lost but the host's time.

A row that a grammar holds drafts what the grammar says must come (`guided`).

Rows whose sampling looks back at the tokens before do not draft: the device would have to take
rejected drafts out of what it remembers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.decoding import DecodeSet
from jaxserve.scheduler.draft_costs import DraftCosts
from jaxserve.scheduler.drafts import Drafts
from jaxserve.scheduler.guided import GuidedDrafts
from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.sequence import Sequence, SequenceState

#: Drafting must promise so much more than plain decoding before it is done.
MARGIN = 1.1


class Drafted(NamedTuple):
    """A row of the next plan.

    Attributes:
        draft: tokens guessed to follow the last known one.
        entries: (group, index, page) of pages that they need.
    """

    sequence: Sequence
    draft: list[int]
    entries: list[tuple[int, int, int]]


class DraftSet:
    """Sequences in state DRAFTING.

    Args:
        config: its draft_tokens and draft_rows.
        decoding: the other rows.
        pages: for the drafts.

    Attributes:
        costs: told how long steps take.
    """

    def __init__(self, config: SchedulerConfig, decoding: DecodeSet, pages: PageAllocator) -> None:
        self.max_rows = config.max_verify_rows
        self.costs = DraftCosts(self.max_rows * (1 + config.draft_tokens))
        self._draft_tokens = config.draft_tokens
        self._decoding = decoding
        self._pages = pages
        self._members: dict[Sequence, None] = {}
        self._drafted: list[Drafted] = []

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def take_in(self, sequences: list[Sequence]) -> None:
        """These got tokens."""
        for sequence in sequences:
            if sequence.looks_back:
                continue
            if sequence.drafts is None:
                sequence.drafts = _drafts(sequence)
            sequence.drafts.take_in()

    def remove(self, sequence: Sequence) -> None:
        """A member leaves; it keeps its slot and pages."""
        del self._members[sequence]

    def regroup(self, allowed: bool) -> None:
        """Decides who drafts in the next plan, who leaves for decoding, and who comes from there.

        Args:
            allowed: whether the plan may hold drafts.
        """
        self._drafted = []
        num_rows = len(self._members) + len(self._decoding)
        allowed = allowed and all(pool.num_free > num_rows for pool in self._pages.pools)
        waits = allowed and any(sequence.has_unread for sequence in self._members)
        if allowed and not waits:
            self._make_drafts()
        drafted = {drafted.sequence for drafted in self._drafted}
        back = {s for s in self._members if not (waits or s.has_unread or s in drafted)}
        for sequence in [s for s in self._members if s in back]:
            del self._members[sequence]
            self._decoding.add(sequence)
        if allowed:
            self._call_for_drafts(back)

    def take_drafted(self) -> list[Drafted]:
        """Rows of the plan that is being made; not those that lost their slots in it."""
        drafted, self._drafted = self._drafted, []
        return [row for row in drafted if row.sequence in self._members]

    def verified(self, sequence: Sequence, num_drafts: int, num_emitted: int) -> None:
        """The outcome for a sequence that goes on."""
        sequence.num_discarded += num_drafts + 1 - num_emitted
        sequence.num_planned = sequence.num_outputs
        if sequence in self._members:
            sequence.num_kept += num_emitted - 1
            start = sequence.num_computed
            sequence.reach(start, start + num_emitted - 1)

    # ------------------------------------------------------------------ decisions

    def _make_drafts(self) -> None:
        """Drafts for members, all of whose tokens have been read."""
        members = list(self._members)
        lengths = self._lengths(len(self._decoding), members, [0] * len(members))
        for sequence, length in zip(members, lengths, strict=True):
            start = sequence.num_computed  # and as far as pages are free: nobody is set back
            length = min(length, self._pages.reachable(sequence.table, start) - start - 1)
            draft = _guess(sequence, length) if length > 0 else []
            if draft:
                entries = self._pages.extend(sequence.table, start, start + 1 + len(draft))
                assert entries is not None
                self._drafted.append(Drafted(sequence, draft, entries))

    def _call_for_drafts(self, exempt: set[Sequence]) -> None:
        """Takes decoding rows out, if it pays: they draft when their tokens have been read.

        Args:
            exempt: have just come back, and decode at least one step.
        """
        wanted = [s for s in self._decoding if s.drafts is not None and s.drafts.foretells]
        wanted = [sequence for sequence in wanted if sequence not in exempt]
        while wanted:
            unread = [self._decoding.num_unread(sequence) for sequence in wanted]
            lengths = self._lengths(
                len(self._decoding) - len(wanted),
                [*wanted, *self._members],
                [*unread, *[0] * len(self._members)],
            )
            drafting = [s for s, length in zip(wanted, lengths, strict=False) if length]
            if len(drafting) == len(wanted):
                break
            wanted = drafting
        for sequence in wanted:
            self._decoding.remove(sequence)
            sequence.state = SequenceState.DRAFTING
            self._members[sequence] = None

    def _lengths(
        self, num_decoding: int, sequences: list[Sequence], unread: list[int]
    ) -> list[int]:
        """How many drafts each should bring; none at all if plain decoding is faster.

        Args:
            num_decoding: rows that go on decoding.
            unread: of each sequence, tokens that must come as foretold before it can draft.
        """
        costs, num_rows = self.costs, num_decoding + len(sequences)
        # While drafting rows are read, decoding rows have a call for themselves.
        num_calls = 2 if num_decoding else 1
        beside_ns = costs.plain_ns(num_decoding) if num_decoding else 0.0
        num_drafts = 0
        best = num_decoding * num_calls + len(sequences), costs.verify_ns(num_rows, 0) + beside_ns
        lengths = []
        for sequence, num_unread in zip(sequences, unread, strict=True):
            length, gain = 0, best[0]
            for num, chance in enumerate(self._chances(sequence, num_unread), 1):
                gain += chance
                ns = costs.verify_ns(num_rows, num_drafts + num) + beside_ns
                if gain * best[1] >= best[0] * ns:
                    length, best = num, (gain, ns)
            num_drafts += length
            lengths.append(length)
        if best[0] * costs.plain_ns(num_rows) < MARGIN * num_rows * best[1]:
            return [0] * len(sequences)
        return lengths

    def _chances(self, sequence: Sequence, num_unread: int) -> Iterator[float]:
        """How likely each of the drafts holds that a sequence may bring, before max_tokens."""
        drafts = sequence.drafts
        if drafts is None or not drafts.foretells:
            return
        left = sequence.max_len - len(sequence.token_ids) - num_unread - 1
        chance = 1.0
        for ahead in range(num_unread + min(self._draft_tokens, left)):
            chance *= drafts.accuracy(ahead)
            if not chance:
                return
            if ahead >= num_unread:
                yield chance


def _drafts(sequence: Sequence) -> Drafts:
    known = sequence.token_ids, sequence.prompt_len
    guide = sequence.constraint
    return Drafts(*known) if guide is None else GuidedDrafts(*known, guide)


def _guess(sequence: Sequence, length: int) -> list[int]:
    assert sequence.drafts is not None
    return sequence.drafts.guess(length)
