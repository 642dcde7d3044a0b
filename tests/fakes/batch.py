"""The plainest reading of a plan: exact shapes, no padding, nothing persistent but positions.

Independent of `engine.batch`, so that a misreading there cannot hide one in the scheduler.
"""

from __future__ import annotations

import numpy as np

from jaxserve.device.step import Program, SlotWrite, StepInputs
from jaxserve.scheduler.plan import Plan


class ExactBatch:
    """Builds the inputs of each plan, in order."""

    def __init__(self) -> None:
        self._decoding: list[int] = []
        self._lengths: dict[int, int] = {}  # slot → tokens whose KV is written

    def build(self, plan: Plan) -> StepInputs:
        """See `engine.loop.Batch`."""
        for slot in plan.decode_leaves:
            self._decoding.remove(slot)
        for slot in plan.decode_joins:
            assert slot not in self._decoding
            self._decoding.append(slot)
        chunk_slots = [chunk.slot for chunk in plan.chunks]
        assert not set(chunk_slots) & set(self._decoding)
        assert len(set(chunk_slots)) == len(chunk_slots)
        assert plan.decode_steps == 1 or not plan.chunks
        for slot in self._decoding:
            self._lengths[slot] += 1
        tokens, successors = [0] * len(self._decoding), [0] * len(self._decoding)
        for chunk in plan.chunks:
            assert chunk.token_ids
            self._lengths[chunk.slot] = chunk.start + len(chunk.token_ids)
            tokens += chunk.token_ids
            successors += [*chunk.token_ids[1:], chunk.next_token_id or 0]
        rows = self._decoding + chunk_slots
        sizes = [1] * len(self._decoding) + [len(chunk.token_ids) for chunk in plan.chunks]
        inputs = StepInputs(
            program=Program(
                num_rows=len(rows),
                num_tokens=len(tokens),
                decode_steps=plan.decode_steps,
                prompt_logprobs=any(c.prompt_logprobs is not None for c in plan.chunks),
            ),
            rows=np.asarray(rows, np.int32),
            num_live_rows=len(rows),
            num_decode_rows=len(self._decoding),
            query_starts=np.cumsum([0, *sizes]),
            context_lens=np.asarray([self._lengths[slot] for slot in rows]),
            token_ids=np.asarray(tokens),
            next_token_ids=np.asarray(successors),
            samples=np.asarray([True] * len(self._decoding) + [c.samples for c in plan.chunks]),
            slot_writes=[
                SlotWrite(
                    slot=j.slot, sampling=j.sampling, prompt_len=j.prompt_len, choice=j.choice
                )
                for j in plan.joins
            ],
            page_copies=[(c.group, c.source, c.target) for c in plan.page_copies],
            page_entries=[(e.group, e.slot, e.index, e.page) for e in plan.page_entries],
            logprobs=True,
        )
        for slot in self._decoding:
            self._lengths[slot] += plan.decode_steps - 1
        return inputs
