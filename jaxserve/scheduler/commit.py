"""What a launched plan keeps until it is read, and what reading it brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from jaxserve.scheduler.plan import Chunk, Plan
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import Owners


@dataclass(slots=True)
class Commit:
    """What one step brought, once read back.

    Attributes:
        sequences, token_ids, rows: parallel: who got tokens, which, and its row in the step.
        chunks: (sequence, chunk, row) of each chunk whose prompt log-probabilities are due.
        finished: sequences that ended in this step.
        ends: of these, the row and how many of its tokens were needed, an end token included.
        verified: (sequence, drafts, tokens that came of them) of each row with drafts; of ended
            sequences, too.
    """

    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    chunks: list[tuple[Sequence, Chunk, int]] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    verified: list[tuple[Sequence, int, int]] = field(default_factory=list)

    @property
    def num_drafted(self) -> int:
        """Drafts that the step verified."""
        return sum(num_drafts for _, num_drafts, _ in self.verified)

    @property
    def num_accepted(self) -> int:
        """Those of them that were right."""
        return sum(num_tokens - 1 for _, _, num_tokens in self.verified)


@dataclass(slots=True)
class Launched:
    """A plan, who held which slot in it, and which decoding rows opened a page."""

    plan: Plan
    owners: Owners
    opened: list[Sequence]

    def read(
        self, rows: list[int], token_ids: list[list[int]], clock_ns: Callable[[], int]
    ) -> Commit:
        """What the step brought; those that ended have a reason and are still to be taken out.

        Args:
            rows: slot of each live row: the decoding rows, then the plan's chunks in order.
            token_ids: the tokens of each live row, one a decode step; as `StepOutputs` where
                drafts were verified.
            clock_ns: CLOCK_MONOTONIC.
        """
        owners = cast(list[Sequence], self.owners)  # a live row's slot has an owner
        chunks = self.plan.chunks
        num_decode_rows = len(rows) - len(chunks)
        commit = Commit()
        if token_ids and len(token_ids[0]) > self.plan.decode_steps:
            token_ids = [_standing(sampled) for sampled in token_ids]
        for row, chunk in enumerate(chunks, num_decode_rows):
            sequence = owners[chunk.slot]
            assert chunk.slot == rows[row], "the step's chunk rows are not in the plan's order"
            if chunk.prompt_logprobs is not None and sequence.reason is None:
                commit.chunks.append((sequence, chunk, row))
            if chunk.num_drafts:
                commit.verified.append((sequence, chunk.num_drafts, len(token_ids[row])))
            if not chunk.samples:
                token_ids[row] = []
            elif sequence.first_token_ns == 0:
                sequence.first_token_ns = clock_ns()
        found, found_tokens, found_rows = commit.sequences, commit.token_ids, commit.rows
        # The one loop over all rows: keep it small.
        for row, (slot, tokens) in enumerate(zip(rows, token_ids, strict=True)):
            sequence = owners[slot]
            if sequence.reason is not None or not tokens:
                continue
            known = sequence.token_ids
            goes_on = len(known) + len(tokens) < sequence.max_len
            if goes_on and sequence.stop_token_ids.isdisjoint(tokens):
                known += tokens
            else:
                tokens = sequence.accept(tokens)
                if sequence.reason is not None:
                    commit.finished.append(sequence)
                    num_needed = len(tokens) + (sequence.stop_token_id is not None)
                    commit.ends.append((row, num_needed))
                if not tokens:
                    continue
            found.append(sequence)
            found_tokens.append(tokens)
            found_rows.append(row)
        return commit


def _standing(sampled: list[int]) -> list[int]:
    """A row's tokens up to where a draft was not accepted, which is less than any token."""
    return [token for token in sampled if token >= 0]
