"""Batches for tests: the plainest reading of a plan, and one that compares the real one with it.

`ExactBatch` has exact shapes, no padding, nothing persistent but positions. It is independent of
`engine.batch`, so that a misreading there cannot hide one in the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxserve.device.step import AdapterWrite, Program, SlotWrite, StepInputs
from jaxserve.engine.batch import Shapes
from jaxserve.engine.batches import Batches
from jaxserve.scheduler.plan import Plan


class ExactBatch:
    """Builds the inputs of each plan, in order."""

    def __init__(self) -> None:
        self._wants: dict[int, bool] = {}  # slot → log-probabilities
        self._masked: dict[int, bool] = {}  # slot → a grammar
        self._adapters: dict[int, int] = {}  # slot → slot of its adapter
        self._decoding: list[int] = []
        self._lengths: dict[int, int] = {}  # slot of a decoding row → tokens whose KV is written

    def build(self, plans: Sequence[Plan | None]) -> list[StepInputs]:
        """See `engine.turn.Batch`; of one copy of the model."""
        (plan,) = plans
        assert plan is not None
        self._wants |= {join.slot: join.sampling.logprobs is not None for join in plan.joins}
        self._masked |= {join.slot: join.sampling.grammar is not None for join in plan.joins}
        self._adapters |= {join.slot: join.adapter for join in plan.joins}
        for slot in plan.decode_leaves:
            self._decoding.remove(slot)
        for slot, start in zip(plan.decode_joins, plan.decode_starts, strict=True):
            assert slot not in self._decoding
            self._decoding.append(slot)
            self._lengths[slot] = start
        chunk_slots = [chunk.slot for chunk in plan.chunks]
        assert not set(chunk_slots) & set(self._decoding)
        assert len(set(chunk_slots)) == len(chunk_slots)
        assert plan.decode_steps <= 1 or not plan.chunks
        decoding = self._decoding if plan.decode_steps else []
        for slot in decoding:
            self._lengths[slot] += 1
        tokens, successors = [0] * len(decoding), [0] * len(decoding)
        num_drafts = max((chunk.num_drafts for chunk in plan.chunks), default=0)
        for chunk in plan.chunks:
            assert len(chunk.token_ids) > chunk.num_drafts
            if num_drafts:  # there are drafts in all chunks or in none, each behind one known token
                assert len(chunk.token_ids) == 1 + chunk.num_drafts > 1 and chunk.samples
                assert plan.decode_steps == 1
            tokens += chunk.token_ids
            successors += [*chunk.token_ids[1:], chunk.next_token_id or 0]
        rows = decoding + chunk_slots
        sizes = [1] * len(decoding) + [len(chunk.token_ids) for chunk in plan.chunks]
        lengths = [self._lengths[slot] for slot in decoding]
        lengths += [chunk.start + len(chunk.token_ids) for chunk in plan.chunks]
        inputs = StepInputs(
            program=Program(
                num_rows=len(rows),
                num_tokens=len(tokens),
                decode_steps=max(plan.decode_steps, 1),
                prompt_logprobs=any(c.prompt_logprobs is not None for c in plan.chunks),
                draft_tokens=num_drafts,
                adapters=any(self._adapters[slot] >= 0 for slot in rows),
            ),
            adapters=np.asarray([self._adapters[slot] for slot in rows], np.int32),
            adapter_writes=[
                AdapterWrite(slot=load.slot, arrays=load.key) for load in plan.adapter_loads
            ],
            rows=np.asarray(rows, np.int32),
            num_live_rows=len(rows),
            num_decode_rows=len(decoding),
            query_starts=np.cumsum([0, *sizes]),
            context_lens=np.asarray(lengths),
            token_ids=np.asarray(tokens),
            next_token_ids=np.asarray(successors),
            samples=np.asarray([True] * len(decoding) + [c.samples for c in plan.chunks]),
            slot_writes=[
                SlotWrite(
                    slot=j.slot,
                    sampling=j.sampling,
                    prompt_len=j.prompt_len,
                    choice=j.choice,
                    prefix=j.prefix,
                )
                for j in plan.joins
            ],
            page_copies=[(c.group, c.source, c.target) for c in plan.page_copies],
            page_entries=plan.page_entries,
            page_saves=[(s.group, s.page, s.host_page) for s in plan.page_saves],
            page_loads=[(load.group, load.host_page, load.page) for load in plan.page_loads],
            logprobs=any(
                self._wants[slot] for slot in decoding + [c.slot for c in plan.chunks if c.samples]
            ),
            masked=any(
                self._masked[slot] for slot in decoding + [c.slot for c in plan.chunks if c.samples]
            ),
        )
        for slot in decoding:
            self._lengths[slot] += plan.decode_steps - 1
        return [inputs]


class DoublingShapes:
    """Programs of every power of two."""

    def choose(
        self,
        num_rows: int,
        num_tokens: int,
        decode_steps: int,
        prompt_logprobs: bool,
        drafts: bool,
        adapters: bool,
    ) -> Program:
        """See `engine.batch.Shapes`."""
        rows = 1 << (num_rows - 1).bit_length()
        if drafts:
            return Program(num_rows=rows, num_tokens=8 * rows, draft_tokens=7, adapters=adapters)
        tokens = max(1 << (num_tokens - 1).bit_length(), rows)
        return Program(
            num_rows=rows,
            num_tokens=rows if num_tokens == num_rows else max(tokens, rows + 1),
            decode_steps=decode_steps,
            prompt_logprobs=prompt_logprobs,
            adapters=adapters,
        )


class ComparedBatch:
    """`engine.batches.Batches` of one copy, each step of which is held against `ExactBatch`.

    Its arrays are also kept, and must be as they were when it is asked to `check`.
    """

    def __init__(self, shapes: Shapes, max_rows: int) -> None:
        self._exact = ExactBatch()
        self._batches = Batches(shapes, max_rows, arrays=lambda key: key)
        self._max_rows = max_rows
        self._kept: deque[tuple[StepInputs, list[np.ndarray]]] = deque(maxlen=4)

    def build(self, plans: Sequence[Plan | None]) -> list[StepInputs]:
        """See `engine.turn.Batch`."""
        (plan,), (exact,), (built,) = plans, self._exact.build(plans), self._batches.build(plans)
        assert plan is not None
        rows, tokens = exact.program.num_rows, exact.program.num_tokens
        program = built.program
        assert (built.num_live_rows, built.num_decode_rows) == (rows, exact.num_decode_rows)
        assert program.decode_steps == max(plan.decode_steps, 1)
        assert program.prompt_logprobs >= exact.program.prompt_logprobs
        assert bool(program.draft_tokens) == bool(exact.program.draft_tokens)
        for array, expected, size, padding in (
            (built.rows, exact.rows, program.num_rows, self._max_rows),
            (built.query_starts, exact.query_starts, program.num_rows + 1, tokens),
            (built.context_lens, exact.context_lens, program.num_rows, 0),
            (built.samples, exact.samples, program.num_rows, False),
            (built.token_ids, exact.token_ids, program.num_tokens, 0),
            (built.next_token_ids, exact.next_token_ids, program.num_tokens, 0),
        ):
            live = len(expected)
            assert array.shape == (size,)
            assert array.dtype == (np.bool_ if array is built.samples else np.int32)
            assert array[:live].tolist() == expected.tolist()
            assert (array[live:] == padding).all()
        assert program.adapters == exact.program.adapters
        if program.adapters:
            assert built.adapters[:rows].tolist() == exact.adapters.tolist()
            assert (built.adapters[rows:] == -1).all()
        changes = (
            "adapter_writes",
            "page_saves",
            "slot_writes",
            "page_copies",
            "page_entries",
            "page_loads",
        )
        for name in (*changes, "logprobs", "masked"):
            assert getattr(built, name) == getattr(exact, name)
        self.check()
        self._kept.append((built, [array.copy() for array in _arrays(built)]))
        return [built]

    def check(self) -> None:
        """The arrays of the latest steps have not been written since."""
        for inputs, copies in self._kept:
            for array, copy in zip(_arrays(inputs), copies, strict=True):
                assert np.array_equal(array, copy)


def _arrays(inputs: StepInputs) -> list[np.ndarray]:
    return [
        inputs.rows,
        inputs.query_starts,
        inputs.context_lens,
        inputs.token_ids,
        inputs.next_token_ids,
        inputs.samples,
    ]
