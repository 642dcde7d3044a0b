"""A step that runs on the device, and how its results are read once they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxserve.device.programs import StepResults, unpack_logprobs
from jaxserve.device.step import StepInputs, StepOutputs


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that runs.

    Attributes:
        inputs: of each copy of the model.
        results: may not be there yet.
        sampled: of the program that sampled a masked step; None until it has been launched.
    """

    inputs: Sequence[StepInputs]
    results: StepResults | None
    launched_ns: int
    sampled: StepResults | None = None

    def token_ids(self) -> Int[np.ndarray, "*C steps R"]:
        """The sampled tokens, waiting for them."""
        sampled = self.sampled or self.results
        assert sampled is not None
        return np.asarray(sampled.token_ids)

    def outputs(
        self, token_ids: Int[np.ndarray, "*C steps R"], *, by_copy: bool
    ) -> list[StepOutputs]:
        """What the step brought to each copy; times are the caller's to fill in.

        Args:
            token_ids: as read.
            by_copy: whether results have an axis of copies in front.
        """
        sampled, results = self.sampled or self.results, self.results
        assert sampled is not None and results is not None
        logprobs = of_prompt = None
        if any(own.logprobs for own in self.inputs):
            logprobs = np.asarray(sampled.logprobs)
        if results.prompt_logprobs is not None:
            of_prompt = np.asarray(results.prompt_logprobs)
        outputs = []
        for copy, own in enumerate(self.inputs):
            place = copy if by_copy else ...
            outputs.append(
                StepOutputs(
                    token_ids=token_ids[place],
                    logprobs=unpack_logprobs(logprobs[place])
                    if logprobs is not None and own.logprobs
                    else None,
                    prompt_logprobs=None
                    if of_prompt is None
                    else unpack_logprobs(of_prompt[place]),
                )
            )
        return outputs
