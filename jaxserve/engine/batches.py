"""The batches of a step: one for each copy of the model, padded to one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.device.step import StepInputs, empty_inputs
from jaxserve.engine.batch import BatchBuilder, Shapes, no_arrays
from jaxserve.scheduler.plan import Plan


class Batches:
    """Builds the inputs of each device call, in order.

    Args:
        shapes: the programs to pad to.
        max_rows: slots that sequences may take, in each copy.
        copies: of the model.
        arrays: of a LoRA adapter, by its key, where there are adapters.
    """

    def __init__(
        self,
        shapes: Shapes,
        max_rows: int,
        copies: int = 1,
        arrays: Callable[[str], Any] = no_arrays,
    ) -> None:
        self.shapes = shapes
        self._max_rows = max_rows
        self._builders = [BatchBuilder(max_rows, arrays) for _ in range(copies)]

    def build(self, plans: Sequence[Plan | None]) -> list[StepInputs]:
        """The inputs of each copy, all of the smallest program that holds every one."""
        sizes = [
            builder.follow(plan)
            for builder, plan in zip(self._builders, plans, strict=True)
            if plan is not None
        ]
        num_rows, num_tokens = max(s.num_rows for s in sizes), max(s.num_tokens for s in sizes)
        if any(s.num_tokens > s.num_rows for s in sizes):
            num_tokens = max(num_tokens, num_rows + 1)  # a program that takes chunks
        program = self.shapes.choose(
            num_rows,
            num_tokens,
            max(s.decode_steps for s in sizes),
            any(s.prompt_logprobs for s in sizes),
            any(s.drafts for s in sizes),
            any(s.adapters for s in sizes),
        )
        return [
            empty_inputs(program, self._max_rows) if plan is None else builder.build(plan, program)
            for builder, plan in zip(self._builders, plans, strict=True)
        ]
