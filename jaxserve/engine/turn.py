"""What a turn of the loop works with: who builds batches, who runs them, and a step that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt

from jaxserve.device.embed_step import EmbedInput, EmbedOutputs, EmbedProgram
from jaxserve.device.step import StepInputs, StepOutputs
from jaxserve.scheduler.embedding import Text
from jaxserve.scheduler.plan import Plan


class Batch(Protocol):
    """Plans to padded arrays (`engine.batches`)."""

    def build(self, plans: Sequence[Plan | None]) -> list[StepInputs]:
        """The inputs of a device call, of each copy of the model. Every call is built, in order."""
        ...


class Executor(Protocol):
    """The device (`device.executor`)."""

    def launch(self, inputs: Sequence[StepInputs]) -> Any:
        """Starts a device call and returns what `collect` takes; does not wait."""
        ...

    def sample(self, launched: Any, masks: Sequence[UInt[np.ndarray, "N W"]]) -> Any:
        """Starts the sampling of the masked step that was launched last, by each copy's masks."""
        ...

    def collect(self, launched: Any) -> list[StepOutputs]:
        """Waits for a call's results, of each copy of the model."""
        ...

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """FLOPs and bytes of a call, counted from shapes."""
        ...

    @property
    def compiles_after_warmup(self) -> int:
        """Programs compiled while serving; stays 0."""
        ...


class Embedder(Protocol):
    """The device, for texts that are embedded (`device.embedder`)."""

    def warm_up(self, progress: Callable[[str, int, int], None], threads: int = 0) -> None:
        """Compiles all programs."""
        ...

    def launch(self, texts: Sequence[EmbedInput]) -> Any:
        """Starts a step of texts that one program holds; does not wait."""
        ...

    def collect(self, launched: Any) -> EmbedOutputs:
        """Waits for a step's vectors."""
        ...

    def count_work(self, lengths: Sequence[int]) -> tuple[int, int]:
        """FLOPs and bytes of texts of such lengths, counted from shapes."""
        ...


@dataclass(slots=True)
class TextsInFlight:
    """A launched embedding step that has not been read.

    Attributes:
        step_id: among the embedding steps.
    """

    step_id: int
    texts: list[Text]
    program: EmbedProgram
    launched: Any


@dataclass(slots=True)
class InFlight:
    """A launched step that has not been read.

    Attributes:
        accounts: of each copy's live rows (`engine.attribution`); empty where it has no plan.
        drafted, accepted: drafts that it verified, and those that were right, once it is read.
    """

    plans: list[Plan | None]
    inputs: list[StepInputs]
    launched: Any
    accounts: list[Int[np.ndarray, "R"]]
    drafted: int = 0
    accepted: int = 0
