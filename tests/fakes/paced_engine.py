"""The fake engine at a fixed pace: each device call takes as long as its tokens cost.

`FAKE_STEP_MS` and `FAKE_PREFILL_TOKEN_US` (environment) set the cost of a call, and of a prompt
token in it. Rows decode together, so the engine serves `max_rows` tokens a step.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.config import Config
from jaxserve.device.step import StepInputs, StepOutputs
from jaxserve.engine import process
from jaxserve.engine.parts import Parts, Progressing
from tests.fakes.engine import fake_parts
from tests.fakes.executor import FakeExecutor


class PacedExecutor:
    """A fake device whose calls take time, one after another.

    Args:
        device: what runs them.
        step_s, prefill_token_s: what a decode step, and a prompt token, takes.
    """

    def __init__(self, device: FakeExecutor, step_s: float, prefill_token_s: float) -> None:
        self._device = device
        self._step_s = step_s
        self._prefill_token_s = prefill_token_s
        self._free_s = 0.0

    @property
    def compiles_after_warmup(self) -> int:
        """None ever."""
        return 0

    def launch(self, inputs: Sequence[StepInputs]) -> tuple[float, float, Any]:
        """Starts a call behind the one before."""
        (own,) = inputs
        prefill_tokens = int(own.query_starts[own.num_live_rows]) - own.num_decode_rows
        took_s = own.program.decode_steps * self._step_s + prefill_tokens * self._prefill_token_s
        self._free_s = max(self._free_s, time.monotonic()) + took_s
        return self._free_s, took_s, self._device.launch(inputs)

    def sample(
        self, launched: tuple[float, float, Any], masks: Sequence[np.ndarray]
    ) -> tuple[float, float, Any]:
        """At the end of the same call."""
        at_s, took_s, step = launched
        return at_s, took_s, self._device.sample(step, masks)

    def collect(self, launched: tuple[float, float, Any]) -> list[StepOutputs]:
        """Waits until the call is over."""
        at_s, took_s, step = launched
        outputs = self._device.collect(step)
        time.sleep(max(0.0, at_s - time.monotonic()))
        outputs[0].device_ns = int(took_s * 1e9)
        return outputs

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """No FLOPs, no bytes."""
        return 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)


def paced_parts(config: Config, progress: Progressing) -> Parts:
    """The fake's parts, its device at a pace."""
    parts = fake_parts(config, progress)
    step_s = float(os.environ.get("FAKE_STEP_MS", "20")) / 1e3
    prefill_token_s = float(os.environ.get("FAKE_PREFILL_TOKEN_US", "100")) / 1e6
    assert isinstance(parts.executor, FakeExecutor)
    paced = PacedExecutor(parts.executor, step_s, prefill_token_s)
    return dataclasses.replace(parts, executor=paced)


if __name__ == "__main__":
    sys.exit(process.main(paced_parts))
