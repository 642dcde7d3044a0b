"""An engine process that some requests end, at once and without a word, while they decode.

A request whose prompt begins with `KILLER` ends it in the step after its `SURVIVES` first tokens;
one that begins with `HANGER` has that step never come back.
"""

from __future__ import annotations

import os
import signal
import sys

from jaxserve.config import Config
from jaxserve.device.step import StepInputs, StepOutputs
from jaxserve.engine import process
from jaxserve.engine.parts import Parts, Progressing
from tests.fakes import engine
from tests.fakes.executor import FakeExecutor, Unsampled

KILLER = 511
HANGER = 510
SURVIVES = 6


class DeadlyExecutor(FakeExecutor):
    """See the module."""

    _first: dict[int, int]  # by slot: the first token of what runs there

    def _run(self, inputs: StepInputs) -> StepOutputs | Unsampled:
        starts = inputs.query_starts
        for row in range(inputs.num_live_rows):
            slot, length = int(inputs.rows[row]), int(inputs.context_lens[row])
            if row >= inputs.num_decode_rows and length == starts[row + 1] - starts[row]:
                self._first[slot] = int(inputs.token_ids[starts[row]])
            if length > SURVIVES and self._first.get(slot) == KILLER:
                os._exit(70)
            if length > SURVIVES and self._first.get(slot) == HANGER:
                signal.pause()
        return super()._run(inputs)


def deadly_parts(config: Config, progress: Progressing) -> Parts:
    """A fake with that device."""
    parts = engine.fake_parts(config, progress)
    assert isinstance(parts.executor, FakeExecutor)
    parts.executor.__class__ = DeadlyExecutor
    parts.executor._first = {}
    return parts


if __name__ == "__main__":
    sys.exit(process.main(deadly_parts))
