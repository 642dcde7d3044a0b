"""Plans to padded arrays: the host side of a step's inputs.

Stands between `scheduler.plan` and `executor.launch`. A plan names only the rows that change; the
builder keeps the decoding rows as compact arrays between steps and moves all of them on with one
addition, so that a row which just goes on costs no Python work.

Invariants: every plan is followed and built, in the order of planning. Arrays handed out are never
written again, since the device may still read them while later steps are built; those that a step
would only repeat are handed out again, read-only. Decoding rows keep their order: who leaves is cut
out, who joins is put behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from jaxserve.device.step import NO_ADAPTER, AdapterWrite, Program, SlotWrite, StepInputs
from jaxserve.scheduler.plan import Plan


class Shapes(Protocol):
    """The compiled step programs (`device.buckets.Buckets`)."""

    def choose(
        self,
        num_rows: int,
        num_tokens: int,
        decode_steps: int,
        prompt_logprobs: bool,
        drafts: bool,
        adapters: bool,
    ) -> Program:
        """The smallest program that holds so many rows and tokens."""
        ...


class StepSize(NamedTuple):
    """What a program must hold; more tokens than rows where decoding rows sit out."""

    num_rows: int
    num_tokens: int
    decode_steps: int
    prompt_logprobs: bool
    drafts: bool
    adapters: bool


def no_arrays(key: str) -> Any:
    """The arrays of an adapter where there are no adapters."""
    raise AssertionError(f"adapter {key} where there are none")


class BatchBuilder:
    """Builds the inputs of each plan, in order: `follow`, then `build` with the program chosen.

    Args:
        max_rows: slots that sequences may take; slot max_rows is scratch.
        arrays: of a LoRA adapter, by its key.
    """

    def __init__(self, max_rows: int, arrays: Callable[[str], Any] = no_arrays) -> None:
        self._max_rows = max_rows
        self._arrays = arrays
        # By slot, the slot of its LoRA adapter; and whether decoding rows have any.
        self._adapters = np.full(max_rows + 1, NO_ADAPTER, np.int32)
        self._decode_adapters = False
        self._logprobs = np.zeros(max_rows, np.bool_)  # by slot: log-probabilities are wanted
        self._masked = np.zeros(max_rows, np.bool_)  # likewise: a grammar holds it
        self._slots = np.zeros(0, np.int32)  # of the decoding rows, in order
        self._contexts = np.zeros(0, np.int32)  # their KV lengths, as of the steps launched
        self._quiet: _Rows | None = None  # the last step's, while nobody joins or leaves

    def follow(self, plan: Plan) -> StepSize:
        """Takes in who joined and left; returns the size of the plan's step."""
        for join in plan.joins:
            self._logprobs[join.slot] = join.sampling.logprobs is not None
            self._masked[join.slot] = join.sampling.grammar is not None
            self._adapters[join.slot] = join.adapter
        if plan.decode_leaves or plan.decode_joins:
            self._change_rows(plan)
        num_decode = self._num_decode(plan)
        num_rows = num_decode + len(plan.chunks)
        num_tokens = num_decode + sum(len(chunk.token_ids) for chunk in plan.chunks)
        return StepSize(
            num_rows,
            num_tokens if plan.decode_steps else max(num_tokens, num_rows + 1),
            max(plan.decode_steps, 1),
            any(chunk.prompt_logprobs is not None for chunk in plan.chunks),
            any(chunk.num_drafts for chunk in plan.chunks),
            (bool(plan.decode_steps) and self._decode_adapters)
            or any(self._adapters[chunk.slot] != NO_ADAPTER for chunk in plan.chunks),
        )

    def build(self, plan: Plan, program: Program) -> StepInputs:
        """The inputs of the plan's device call, after `follow`."""
        rows = self._mixed_rows(plan, program) if plan.chunks else self._decode_rows(program)
        context_lens = np.zeros(rows.program.num_rows, np.int32)
        num_decode = self._num_decode(plan)
        np.add(self._contexts[:num_decode], 1, out=context_lens[:num_decode])
        self._contexts += plan.decode_steps
        for row, chunk in enumerate(plan.chunks, num_decode):
            context_lens[row] = chunk.start + len(chunk.token_ids)
        return StepInputs(
            program=rows.program,
            rows=rows.slots,
            num_live_rows=num_decode + len(plan.chunks),
            num_decode_rows=num_decode,
            query_starts=rows.query_starts,
            context_lens=context_lens,
            token_ids=rows.token_ids,
            next_token_ids=rows.next_token_ids,
            samples=rows.samples,
            slot_writes=[
                SlotWrite(
                    slot=join.slot,
                    sampling=join.sampling,
                    prompt_len=join.prompt_len,
                    choice=join.choice,
                    prefix=join.prefix,
                )
                for join in plan.joins
            ],
            page_copies=[(copy.group, copy.source, copy.target) for copy in plan.page_copies],
            page_entries=plan.page_entries,
            page_saves=[(save.group, save.page, save.host_page) for save in plan.page_saves],
            page_loads=[(load.group, load.host_page, load.page) for load in plan.page_loads],
            logprobs=rows.logprobs,
            masked=rows.masked,
            adapters=self._adapters[rows.slots] if program.adapters else None,
            adapter_writes=[
                AdapterWrite(slot=load.slot, arrays=self._arrays(load.key))
                for load in plan.adapter_loads
            ],
        )

    def _num_decode(self, plan: Plan) -> int:
        """Decoding rows that take part."""
        return len(self._slots) if plan.decode_steps else 0

    def _change_rows(self, plan: Plan) -> None:
        """Cuts out who leaves, puts who joins behind."""
        self._quiet = None
        if plan.decode_leaves:
            stay = ~np.isin(self._slots, plan.decode_leaves)
            self._slots, self._contexts = self._slots[stay], self._contexts[stay]
        if plan.decode_joins:
            joins = np.asarray(plan.decode_joins, np.int32)
            contexts = np.asarray(plan.decode_starts, np.int32)
            assert len(joins) == len(contexts)
            self._slots = np.concatenate([self._slots, joins])
            self._contexts = np.concatenate([self._contexts, contexts])
        self._decode_adapters = bool((self._adapters[self._slots] != NO_ADAPTER).any())

    def _decode_rows(self, program: Program) -> _Rows:
        """Rows of a plan without chunks: the last step's once more, if nothing changed."""
        quiet = self._quiet
        if quiet is None or not quiet.fits(program):
            quiet = _Rows(program, self._max_rows)
            self._fill_decode(quiet, self._slots)
            quiet.freeze()
            self._quiet = quiet
        quiet.program = program
        return quiet

    def _mixed_rows(self, plan: Plan, program: Program) -> _Rows:
        """Rows of a plan with chunks behind the decoding rows."""
        num_decode = self._num_decode(plan)
        slots = self._slots[:num_decode]
        rows = _Rows(program, self._max_rows)
        self._fill_decode(rows, slots)
        start = num_decode
        for row, chunk in enumerate(plan.chunks, num_decode):
            end = start + len(chunk.token_ids)
            rows.slots[row] = chunk.slot
            rows.samples[row] = chunk.samples
            rows.query_starts[row + 1 :] = end
            rows.token_ids[start:end] = chunk.token_ids
            rows.next_token_ids[start : end - 1] = rows.token_ids[start + 1 : end]
            rows.next_token_ids[end - 1] = chunk.next_token_id or 0
            rows.logprobs |= chunk.samples and bool(self._logprobs[chunk.slot])
            rows.masked |= chunk.samples and bool(self._masked[chunk.slot])
            start = end
        rows.freeze()
        return rows

    def _fill_decode(self, rows: _Rows, slots: Int[np.ndarray, "n"]) -> None:
        rows.fill_decode(slots)
        rows.logprobs = bool(self._logprobs[slots].any())
        rows.masked = bool(self._masked[slots].any())


class _Rows:
    """The arrays of a step that do not change while the same rows decode; see `StepInputs`."""

    __slots__ = (
        "logprobs",
        "masked",
        "next_token_ids",
        "program",
        "query_starts",
        "samples",
        "slots",
        "token_ids",
    )

    def __init__(self, program: Program, scratch: int) -> None:
        self.program = program
        self.logprobs = self.masked = False
        self.slots: Int[np.ndarray, "R"] = np.full(program.num_rows, scratch, np.int32)
        self.query_starts: Int[np.ndarray, "R+1"] = np.zeros(program.num_rows + 1, np.int32)
        self.token_ids: Int[np.ndarray, "T"] = np.zeros(program.num_tokens, np.int32)
        self.next_token_ids: Int[np.ndarray, "T"] = np.zeros(program.num_tokens, np.int32)
        self.samples: Bool[np.ndarray, "R"] = np.zeros(program.num_rows, np.bool_)

    def fits(self, program: Program) -> bool:
        """Whether the arrays have the sizes of this program."""
        own = self.program
        return (own.num_rows, own.num_tokens) == (program.num_rows, program.num_tokens)

    def fill_decode(self, slots: Int[np.ndarray, "n"]) -> None:
        """The decoding rows: one token each."""
        num_rows = len(slots)
        self.slots[:num_rows] = slots
        self.query_starts[: num_rows + 1] = np.arange(num_rows + 1)
        self.query_starts[num_rows + 1 :] = num_rows
        self.samples[:num_rows] = True

    def freeze(self) -> None:
        """No array is written after this."""
        for array in (
            self.slots,
            self.query_starts,
            self.token_ids,
            self.next_token_ids,
            self.samples,
        ):
            array.flags.writeable = False
