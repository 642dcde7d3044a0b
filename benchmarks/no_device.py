"""A model of which only the host's part is run: planning, building, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.device.step import StepInputs, StepOutputs
from jaxserve.types import CacheGroup, ModelInfo

PAGE_SIZE = 16
VOCAB_SIZE = 49152
MODEL = ModelInfo(
    name="none",
    max_context=4096,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=(2,),
    cache_groups=(CacheGroup(kind="full", layers=(0,), num_kv_heads=1, head_dim=1),),
)


class NoDevice:
    """Samples fixed tokens; a step ends `step_s` after its launch, and until then we sleep."""

    compiles_after_warmup = 0

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        random = np.random.default_rng(0)
        self._tokens = random.integers(300, VOCAB_SIZE, size=(8, 4096), dtype=np.int32)

    def launch(self, inputs: Sequence[StepInputs]) -> tuple[StepInputs, float]:
        """See `engine.turn.Executor`."""
        return inputs[0], time.monotonic() + self._step_s

    def sample(self, launched: Any, masks: Any) -> Any:
        """Nobody asks for a grammar here."""
        return launched

    def collect(self, launched: tuple[StepInputs, float]) -> list[StepOutputs]:
        """See `engine.turn.Executor`."""
        inputs, ends_s = launched
        time.sleep(max(ends_s - time.monotonic(), 0))
        program = inputs.program
        return [StepOutputs(token_ids=self._tokens[: program.decode_steps, : program.num_rows])]

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """See `engine.turn.Executor`."""
        return 0, 0


class AllowedTokens:
    """As `NoDevice`, at once; takes a token that each row's mask allows."""

    compiles_after_warmup = 0

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def launch(self, inputs: Sequence[StepInputs]) -> Any:
        """See `engine.turn.Executor`."""
        program = inputs[0].program
        shape = program.decode_steps, program.num_rows
        return [StepOutputs(token_ids=self._random.integers(300, 4000, shape))]

    def sample(self, launched: Any, masks: Sequence[np.ndarray]) -> Any:
        """See `engine.turn.Executor`: the first set bit from a random word on."""
        (own,) = masks
        for row in range(launched[0].token_ids.shape[1]):
            words = np.flatnonzero(own[row])
            if len(words) > 1:
                words = words[1:]  # the lowest token of the first one would be the end
            word = int(words[self._random.integers(len(words))])
            bit = int(own[row, word]) & -int(own[row, word])
            launched[0].token_ids[0, row] = word * 32 + bit.bit_length() - 1
        return launched

    def collect(self, launched: Any) -> list[StepOutputs]:
        """See `engine.turn.Executor`."""
        return launched

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """See `engine.turn.Executor`."""
        return 0, 0
