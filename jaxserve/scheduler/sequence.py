"""One sequence: a prompt and what is generated after it, from submission to its end.

The scheduler moves it through its states; the engine reads its counts and times into the record
that the client gets. There are no phases: `num_computed` catches up with the known tokens, in
chunks, and when it has caught up the sequence decodes.

Tokens of a sequence, so that the counts add up (all but the known tokens are settled at its end):
    sampled on the device = emitted + discarded + 1 if a stop token ended it
    positions run through the model = computed + recomputed + drafted - kept
A position that is set back with its page saved is neither run nor counted again.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxserve.scheduler.drafts import Drafts
from jaxserve.scheduler.host_pages import HostTable
from jaxserve.scheduler.pages import PageTable
from jaxserve.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    from jaxserve.scheduler.accounts import Account
    from jaxserve.structured.constraint import Constraint


class SequenceState(enum.Enum):
    """Where a sequence is."""

    HELD = enum.auto()  # a further choice: waits for the first one's prompt to be computed
    PARKED = enum.auto()  # waits for a slot for its adapter, out of the queue
    WAITING = enum.auto()  # in the queue: new, preempted, or a choice whose prompt is computed
    PREFILLING = enum.auto()  # has a slot; known tokens are being computed
    DECODING = enum.auto()  # has a slot; each step samples its next token
    DRAFTING = enum.auto()  # has a slot; its next tokens are guessed and verified together
    RETIRED = enum.auto()  # its last token is launched but not read; holds no slot and no pages
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """How far a request had come in an engine that ended.

    Attributes:
        choices: indexes of the choices that go on.
        emitted: output tokens of each.
        queued_ns: how long each has waited for a row.
        num_prompt_logprobs: prompt tokens after the first whose log-probabilities were reported.
    """

    choices: list[int]
    emitted: list[list[int]]
    queued_ns: list[int]
    num_prompt_logprobs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUse:
    """The LoRA adapter of a sequence.

    Attributes:
        key: the hash of its content.
        rank_class: of the slots that it fits.
    """

    key: str
    rank_class: int


@dataclass(slots=True)
class Wait:
    """A stretch in which a sequence that was let in did not run.

    Attributes:
        kind: "preempted", "swapped" (its pages were on the host) or "adapter" (parked for a slot).
        end_ns: 0 while it goes on.
    """

    kind: str
    start_ns: int
    end_ns: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """State of one generation.

    Attributes:
        key: (client, the client's id of it); opaque here.
        token_ids: known tokens: the prompt, then what was read back from the device.
        max_len: tokens at which max_tokens are reached.
        looks_back: whether its sampling depends on which tokens came before.
        level: its priority, or `queue.AGED`; smaller runs first.
        arrival: number among all that came; within a level the last is preempted first.
        account: what is charged for it.
        is_charged: whether its prompt has been; num_charged: tokens of it that were.
        has_begun: whether any sequence of its request has run.
        waited_ns: in the queue, before this wait; waits_since_ns: when this one began, 0 in none.
        stop_token_ids: end the sequence when sampled; the model's end tokens among them.
        root: what the digests of its pages begin with; digests: of its first full pages: its
            prompt's, and others as far as they were needed.
        copy: of the model, that it lives on.
        adapter: its LoRA adapter; None for the base model.
        adapter_slot: where that is, while it holds a row; -1 else.
        request: number of its request in the flight recorder; 0: none.
        host_table: its pages on the host, while it waits with its cache saved.
        waits: those that were more than the queue, for the record.
        traceparent: of whoever submitted it, for the record.
        followers: choices that wait to share this one's prompt.
        num_computed: positions whose KV is launched; while decoding see `decode_base`.
        num_planned: output tokens launched, read back or not; drafts among them.
        drafts: guesses of its next tokens, once it has been followed for them.
        constraint: what holds its output to its grammar (`structured.constraint.Constraint`).
        num_drafted, num_kept: drafts launched; and those of them whose KV it went on with.
        decode_base: while decoding, the next position is this plus the scheduler's clock.
        end_clock: while decoding, the clock at which all its tokens are launched.
        num_reached: most positions ever launched; below it positions are recomputed.
        num_prompt_logprobs_planned, num_prompt_logprobs: prompt tokens after the first whose
            log-probabilities are launched, and reported.
    """

    key: tuple[Hashable, int]
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    choice: int
    level: int
    arrival: int
    stop_token_ids: frozenset[int]
    table: PageTable
    account: Account | None = None
    arrived_ns: int = 0
    root: bytes = b""
    max_len: int = field(init=False)
    looks_back: bool = field(init=False)

    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    copy: int = 0
    adapter: AdapterUse | None = None
    adapter_slot: int = -1
    request: int = 0
    digests: list[bytes] = field(default_factory=list)
    host_table: HostTable | None = None
    followers: list[Sequence] = field(default_factory=list)
    leader: Sequence | None = None
    drafts: Drafts | None = None
    constraint: Constraint | None = None
    num_computed: int = 0
    num_planned: int = 0
    decode_base: int = 0
    end_clock: int = 0
    num_reached: int = 0
    num_prompt_logprobs_planned: int = 0
    num_prompt_logprobs: int = 0

    is_charged: bool = False
    num_charged: int = 0
    has_begun: bool = False
    waited_ns: int = 0
    waits_since_ns: int = 0
    reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached: int = 0
    num_recomputed: int = 0
    num_drafted: int = 0
    num_kept: int = 0
    num_swapped: int = 0
    num_discarded: int = 0
    num_preemptions: int = 0
    queued_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    waits: list[Wait] = field(default_factory=list)
    traceparent: str = ""

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.max_len = self.prompt_len + sampling.max_tokens
        self.looks_back = (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or any(len(word) > 1 for word in sampling.bad_words)
        )

    def resume(self, emitted: list[int], num_prompt_logprobs: int, queued_ns: int = 0) -> None:
        """Goes on from what an engine that ended had emitted: those tokens are known.

        Its positions count as reached, so that what it computes of them is recomputed. Its tenant
        was charged for the prompt, and it is not shed. What it waited there counts as waiting.
        """
        self.is_charged = self.has_begun = True
        self.waited_ns = queued_ns
        self.token_ids += emitted
        if emitted:
            self.num_reached = len(self.token_ids) - 1
        if self.choice == 0:
            self.num_prompt_logprobs = self.num_prompt_logprobs_planned = num_prompt_logprobs

    @property
    def rank(self) -> tuple[int, int]:
        """(level, arrival): the largest is preempted first."""
        return self.level, self.arrival

    @property
    def num_outputs(self) -> int:
        """Output tokens read back."""
        return len(self.token_ids) - self.prompt_len

    @property
    def has_unread(self) -> bool:
        """Whether tokens of it are launched that have not been read back."""
        return self.num_planned + self.prompt_len > len(self.token_ids)

    @property
    def num_first_computed(self) -> int:
        """Positions that it ran through the model for the first time."""
        return self.num_reached - self.num_cached

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether prompt tokens must be run for their log-probabilities."""
        return (
            self.sampling.prompt_logprobs is not None
            and self.choice == 0
            and self.num_prompt_logprobs_planned < self.prompt_len - 1
        )

    def prefix_looked_back_at(self) -> list[int]:
        """The tokens that its slot will not see, if its sampling depends on them.

        Presence and frequency penalties count output tokens only; single bad words need no history.
        """
        sampling = self.sampling
        if not self.looks_back or (
            self.num_computed <= self.prompt_len
            and sampling.repetition_penalty == 1
            and all(len(word) == 1 for word in sampling.bad_words)
        ):
            return []
        return self.token_ids[: self.num_computed]

    def end_waits(self, now_ns: int) -> None:
        """It runs again."""
        for wait in self.waits:
            wait.end_ns = wait.end_ns or now_ns

    def count_found(self) -> int:
        """Positions up to `num_computed` that were never launched for it count as cached.

        Returns:
            How many are new.
        """
        found = self.num_computed - self.num_reached
        if found <= 0:
            return 0
        self.num_cached += found
        self.num_reached = self.num_computed
        return found

    def reach(self, start: int, end: int) -> None:
        """Counts positions start … end - 1 as launched, once more or for the first time."""
        if start < self.num_reached:
            self.num_recomputed += min(end, self.num_reached) - start
        if end > self.num_reached:
            self.num_reached = end
        self.num_computed = end

    def accept(self, sampled: list[int]) -> list[int]:
        """Takes tokens read back, of which one may end the sequence; returns those to emit.

        Sets `reason` when it ends. A stop token is kept beside the tokens, not among them.
        """
        known = self.token_ids
        for index, token in enumerate(sampled):
            if token in self.stop_token_ids:
                self.stop_token_id = token
                self.reason = FinishReason.STOP
                return sampled[:index]
            known.append(token)
            if len(known) == self.max_len:
                self.reason = FinishReason.LENGTH
                return sampled[: index + 1]
        return sampled
