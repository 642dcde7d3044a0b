"""What a plan says of one sequence: that it takes a slot, and the tokens that it runs."""

from __future__ import annotations

from jaxserve.scheduler.plan import Chunk, Join
from jaxserve.scheduler.sequence import Sequence


def join_of(sequence: Sequence) -> Join:
    """A sequence takes the slot it was given."""
    return Join(
        slot=sequence.slot,
        sampling=sequence.sampling,
        prompt_len=sequence.prompt_len,
        choice=sequence.choice,
        prefix=sequence.prefix_looked_back_at(),
        request=sequence.request,
        adapter=sequence.adapter_slot,
    )


def chunk_of(sequence: Sequence, end: int, *, again: bool = False) -> Chunk:
    """A sequence's known tokens from the first that is not computed up to `end`.

    Prompt log-probabilities that come due are noted as planned.

    Args:
        again: they are computed also where they were before.
    """
    start, known = sequence.num_computed, sequence.token_ids
    samples = end == len(known)
    prompt_len, reached = sequence.prompt_len, sequence.num_reached
    num_again = min(end, reached) - start if start < reached else 0
    wanted = sequence.sampling.prompt_logprobs
    return Chunk(
        slot=sequence.slot,
        start=start,
        token_ids=known[start:end],
        samples=samples,
        prompt_logprobs=None if wanted is None else _due_logprobs(sequence, wanted, end, again),
        next_token_id=None if samples else known[end],
        num_again=num_again,
        num_outputs=end - max(start + num_again, prompt_len) if end > prompt_len else 0,
    )


def _due_logprobs(sequence: Sequence, wanted: int, end: int, again: bool) -> int | None:
    """Wanted alternatives of the prompt tokens up to `end`; None where they are planned already."""
    if sequence.choice:
        return None
    due, planned = min(end, sequence.prompt_len - 1), sequence.num_prompt_logprobs_planned
    sequence.num_prompt_logprobs_planned = max(due, planned)
    return wanted if due > planned or again else None


def drafts_of(sequence: Sequence, draft: list[int]) -> Chunk:
    """A sequence's last known token, and what is guessed to follow it."""
    start = sequence.num_computed
    return Chunk(
        slot=sequence.slot,
        start=start,
        token_ids=[sequence.token_ids[start], *draft],
        samples=True,
        num_drafts=len(draft),
    )
