"""A step's plan: what the scheduler tells the batch builder, as deltas against the last step.

Integers only, no arrays and no JAX. Only rows that join, leave or cross a page appear; decoding
rows that just go on are visited by nobody. On several hosts this is what would be broadcast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jaxserve.types import SamplingParams

#: (group, slot, index, page): slot's logical page `index` of a cache group is now page `page`. A
#: plain tuple, as `StepInputs` has it: a plan may hold hundreds.
PageEntry = tuple[int, int, int, int]


@dataclass(slots=True, kw_only=True)
class Join:
    """A sequence takes row slot `slot`: the device resets the slot and stores its parameters.

    Attributes:
        prompt_len: tokens before it are prompt, from it on output (also when recomputed).
        choice: index among the request's n, keys the random bits.
        prefix: tokens at positions 0, 1, … whose KV was found instead of computed, be it shared
            or brought back from the host; given only where the sampling parameters look back at
            them.
        request: whose sequence it is, for the flight recorder; the device does not see it.
        adapter: slot of its LoRA adapter; -1 for none.
    """

    slot: int
    sampling: SamplingParams
    prompt_len: int
    choice: int
    prefix: list[int] = field(default_factory=list)
    request: int = 0
    adapter: int = -1


@dataclass(slots=True, kw_only=True)
class AdapterLoad:
    """Put an adapter into one of the slots of adapters, before anything else.

    Attributes:
        key: the hash of its content.
    """

    slot: int
    key: str


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Known tokens of one row to run through the model: part of a prompt, or of a recomputation.

    Attributes:
        start: position of the first token.
        token_ids: the tokens at start, start + 1, …
        samples: whether the chunk ends at the last known token, so that the next one is sampled.
        prompt_logprobs: wanted alternatives a prompt position, None if not wanted.
        next_token_id: the token after the chunk's last one, where it is known: the last position
            needs it for its prompt log-probability. None where the chunk ends the known tokens.
        num_drafts: of `token_ids`, those at the end that are guesses to be verified, behind the
            last known token. A token is then sampled after each of them.
        num_again, num_outputs: of `token_ids`, those at the beginning that were computed before,
            and those behind that are output; what is left is prompt. For who divides the step's
            time; the device does not see them.
    """

    slot: int
    start: int
    token_ids: list[int]
    samples: bool
    prompt_logprobs: int | None = None
    next_token_id: int | None = None
    num_drafts: int = 0
    num_again: int = 0
    num_outputs: int = 0


@dataclass(slots=True, kw_only=True)
class PageCopy:
    """Copy a page within group `group` before the step (a shared page is about to be written)."""

    group: int
    source: int
    target: int


@dataclass(slots=True, kw_only=True)
class PageSave:
    """Copy a page of group `group` to the host, as of all steps launched before this plan's."""

    group: int
    page: int
    host_page: int


@dataclass(slots=True, kw_only=True)
class PageLoad:
    """Copy a page of group `group` from the host, before the step."""

    group: int
    host_page: int
    page: int


@dataclass(slots=True, kw_only=True)
class Plan:
    """One device call.

    Attributes:
        adapter_loads, page_saves, joins, page_entries, page_copies, page_loads: changes of device
            state, applied in this order before the step's work.
        decode_joins, decode_leaves: slots that enter or leave the set of decoding rows; every
            decoding row brings one token a decode step, its input being the token the device
            sampled last for that slot. Leaves come first: a slot that one sequence leaves may be
            joined by another in the same plan. A slot joins the decoding rows after a chunk of it
            that samples.
        decode_starts: of each of `decode_joins`, the position of its next token.
        chunks: prefill work; or drafts to verify, of all chunks or of none.
        decode_steps: > 1 runs several decode steps in this one call; then there are no chunks,
            and page tables already cover the positions. 0: the decoding rows sit this call out.
    """

    step_id: int
    adapter_loads: list[AdapterLoad] = field(default_factory=list)
    page_saves: list[PageSave] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    page_entries: list[PageEntry] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)
    page_loads: list[PageLoad] = field(default_factory=list)
    decode_joins: list[int] = field(default_factory=list)
    decode_starts: list[int] = field(default_factory=list)
    decode_leaves: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decode_steps: int = 1

    def enter(self, slot: int, entries: Iterable[tuple[int, int, int]]) -> None:
        """Adds page-table entries of a slot: (group, index, page)."""
        self.page_entries += [(group, slot, index, page) for group, index, page in entries]

    def forget_entries(self, since: Mapping[int, int]) -> None:
        """Drops entries of slots that have changed hands within the plan: it may name each once.

        Args:
            since: by slot, how many entries the plan had when its new owner took it.
        """
        self.page_entries = [
            entry
            for place, entry in enumerate(self.page_entries)
            if place >= since.get(entry[1], 0)
        ]
