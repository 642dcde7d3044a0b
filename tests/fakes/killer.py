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
from tests.fakes.executor import FakeExecutor

KILLER = 511
HANGER = 510
SURVIVES = 6


class DeadlyExecutor(FakeExecutor):
    """See the module."""

    def _run(self, inputs: StepInputs) -> StepOutputs:
        for slot in inputs.rows[: inputs.num_live_rows].tolist():
            seen = self._seen[slot]
            if seen and len(seen) > SURVIVES and seen[0] in (KILLER, HANGER):
                if seen[0] == KILLER:
                    os._exit(70)
                signal.pause()
        return super()._run(inputs)


def deadly_parts(config: Config, progress: Progressing) -> Parts:
    """A fake with that device."""
    parts = engine.fake_parts(config, progress)
    assert isinstance(parts.executor, FakeExecutor)
    parts.executor.__class__ = DeadlyExecutor
    return parts


if __name__ == "__main__":
    sys.exit(process.main(deadly_parts))
