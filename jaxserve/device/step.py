"""What crosses between the host and the device in one step: padded inputs in, results out.

`engine.batch` builds `StepInputs` from the scheduler's plan; an executor launches them and later
returns `StepOutputs`. Plain numpy on both sides, so that a fake executor needs no device and the
step can be broadcast as bytes.

Where a row's next token has to match a grammar, which tokens may come depends on the one before,
and that is read while the step runs already. Such a step (`StepInputs.masked`) runs the model
alone; then `MaskedSampling`, a program of its own, samples all its rows by masks that the host has
made meanwhile.

Layout of a step's tokens: the decoding rows come first, one token each, then the chunks. In a
verification program a chunk is the last known token of a row and drafts of what follows it. Row r
owns tokens query_starts[r] : query_starts[r + 1]. Slots are the persistent row positions of device
state (0 … max_rows - 1); slot max_rows is scratch, where padding rows point.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxserve.types import SamplingParams

#: Stands in `StepOutputs.token_ids` where a draft before was not accepted.
NOT_ACCEPTED = -1


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Program:
    """Shape of one compiled step program.

    Attributes:
        num_rows: rows it is padded to.
        num_tokens: tokens it is padded to; equal to num_rows for a decode program.
        decode_steps: decode steps done in one call; 1 where there are chunks.
        prompt_logprobs: whether it also returns log-probabilities of the chunk's own tokens.
        adapters: whether its rows may use LoRA adapters; without, nothing of them is in it.
        draft_tokens: of a verification program, the most drafts that a row may bring behind its
            last known token; every token is sampled after. 0 for all others.
    """

    num_rows: int
    num_tokens: int
    decode_steps: int = 1
    prompt_logprobs: bool = False
    draft_tokens: int = 0
    adapters: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether every row brings exactly one token."""
        return self.num_tokens == self.num_rows

    def sampling(self, *, heads: bool) -> MaskedSampling:
        """The program that samples its rows where they have masks.

        Args:
            heads: whether adapters may have deltas of the output head.
        """
        return MaskedSampling(
            num_rows=self.num_rows,
            draft_tokens=self.draft_tokens,
            adapters=self.adapters and heads,
        )

    @property
    def num_places(self) -> int:
        """Tokens after which one is sampled: each row's last, or every one where drafts are."""
        return self.num_rows * (1 + self.draft_tokens)

    @property
    def name(self) -> str:
        """Short name for logs and metrics: `decode_r32_k8`, `mixed_r32_t512`, `verify_r8_d7`.

        Those for adapters end in `_lora`.
        """
        lora = "_lora" if self.adapters else ""
        if self.draft_tokens:
            return f"verify_r{self.num_rows}_d{self.draft_tokens}{lora}"
        kind = "decode" if self.is_decode else "mixed"
        size = f"r{self.num_rows}" + ("" if self.is_decode else f"_t{self.num_tokens}")
        steps = f"_k{self.decode_steps}" if self.decode_steps > 1 else ""
        return f"{kind}_{size}{steps}" + ("_plp" if self.prompt_logprobs else "") + lora


#: In place of an adapter's slot.
NO_ADAPTER = -1


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class MaskedSampling:
    """Shape of the program that samples what a step's model has computed.

    Attributes:
        num_rows, draft_tokens: of the step's program.
        adapters: whether its rows' adapters may have deltas of the output head.
    """

    num_rows: int
    draft_tokens: int = 0
    adapters: bool = False

    @property
    def num_places(self) -> int:
        """As `Program.num_places`."""
        return self.num_rows * (1 + self.draft_tokens)

    @property
    def name(self) -> str:
        """Short name for logs and metrics: `sample_r32`, `sample_r8_d7`, `sample_r32_lora`."""
        drafts = f"_d{self.draft_tokens}" if self.draft_tokens else ""
        return f"sample_r{self.num_rows}{drafts}" + ("_lora" if self.adapters else "")


@dataclass(slots=True, kw_only=True)
class SlotWrite:
    """Resets device state of one slot and stores its sequence's sampling parameters.

    `prefix` as in `scheduler.plan.Join`: tokens that the slot will not see entering the model.
    """

    slot: int
    sampling: SamplingParams
    prompt_len: int
    choice: int
    prefix: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class AdapterWrite:
    """Puts an adapter into one of the slots of adapters.

    Attributes:
        arrays: as `models.adapters` makes them.
    """

    slot: int
    arrays: Any


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """One step, padded to its program.

    Attributes:
        rows: slot of each row; scratch slot for padding.
        num_live_rows, num_decode_rows: how many of `rows` are real, and decode.
        query_starts: first token of each row; padding rows repeat the end.
        context_lens: KV length of each row after this step's tokens (its first decode step's,
            where there are several); 0 for padding.
        token_ids: chunk tokens at their places; decode rows' entries are ignored, since the
            device knows the token it sampled last for the slot.
        next_token_ids: at each chunk token, the token that follows it in its sequence (prompt
            log-probabilities are of these); 0 for decode rows, padding and where none is known.
        samples: rows whose next token is sampled and kept as the slot's last token.
        adapters: of each row, the slot of its adapter, or NO_ADAPTER; None in programs without.
        adapter_writes: applied before anything else.
        page_saves: (group, page, host page), applied first: they read the pages as of all steps
            launched before.
        slot_writes: applied next.
        page_copies: (group, source, target), applied before the step writes.
        page_entries: (group, slot, index, page) page-table deltas, applied before the step.
        page_loads: (group, host page, page), applied last before the step.
        logprobs: whether any sampling row asked for log-probabilities.
        masked: whether any sampling row's token has to match a grammar: the step leaves sampling
            to `MaskedSampling`. Never with several decode steps.
    """

    program: Program
    rows: Int[np.ndarray, "R"]
    num_live_rows: int
    num_decode_rows: int
    query_starts: Int[np.ndarray, "R+1"]
    context_lens: Int[np.ndarray, "R"]
    token_ids: Int[np.ndarray, "T"]
    next_token_ids: Int[np.ndarray, "T"]
    samples: Bool[np.ndarray, "R"]
    slot_writes: list[SlotWrite] = field(default_factory=list)
    page_copies: list[tuple[int, int, int]] = field(default_factory=list)
    page_entries: list[tuple[int, int, int, int]] = field(default_factory=list)
    page_saves: list[tuple[int, int, int]] = field(default_factory=list)
    page_loads: list[tuple[int, int, int]] = field(default_factory=list)
    logprobs: bool = False
    masked: bool = False
    adapters: Int[np.ndarray, "R"] | None = None
    adapter_writes: list[AdapterWrite] = field(default_factory=list)


def empty_inputs(program: Program, scratch: int) -> StepInputs:
    """A step without rows: for warm-up, and for a copy of the model that has nothing to do.

    Args:
        scratch: the slot that padding rows point to.
    """
    rows, tokens = program.num_rows, program.num_tokens
    return StepInputs(
        program=program,
        rows=np.full(rows, scratch, np.int32),
        num_live_rows=0,
        num_decode_rows=0,
        query_starts=np.zeros(rows + 1, np.int32),
        context_lens=np.zeros(rows, np.int32),
        token_ids=np.zeros(tokens, np.int32),
        next_token_ids=np.zeros(tokens, np.int32),
        samples=np.zeros(rows, np.bool_),
        adapters=np.full(rows, NO_ADAPTER, np.int32) if program.adapters else None,
    )


@dataclass(slots=True, kw_only=True)
class LogprobArrays:
    """Log-probabilities beside token positions; arrays share their leading axes.

    Attributes:
        chosen, rank: of the token that stands there.
        top_ids, top_values: the MAX_LOGPROBS most likely, best first.
    """

    chosen: Float[np.ndarray, "..."]
    rank: Int[np.ndarray, "..."]
    top_ids: Int[np.ndarray, "... 20"]
    top_values: Float[np.ndarray, "... 20"]


@dataclass(slots=True, kw_only=True)
class StepOutputs:
    """What a step brought.

    Attributes:
        token_ids: sampled token of each row and decode step; undefined where it does not sample.
            Of a verification program, the sample after each accepted draft too, in order (steps is
            then 1 + draft_tokens), and NOT_ACCEPTED behind the last of them.
        logprobs: leading axes as token_ids; None where nobody asked.
        prompt_logprobs: [T]: of `next_token_ids[t]` given the tokens of the row up to t; None
            unless the program has them.
        device_ns, idle_ns: as `StepStats`.
        page_ns: by cache group, what it takes to save a page to the host and to load it again;
            empty where there is no host store.
    """

    token_ids: Int[np.ndarray, "steps R"]
    logprobs: LogprobArrays | None = None
    prompt_logprobs: LogprobArrays | None = None
    device_ns: int = 0
    idle_ns: int = 0
    page_ns: tuple[float, ...] = ()
