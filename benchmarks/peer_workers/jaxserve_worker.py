"""This engine as a peer: the real scheduler, batch and executor, in one process.

Arguments: MODEL PATH, THREADS (XLA takes its own number), then SECTION.KEY=VALUE settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

from channel import Channel, Measured

channel = Channel()

import jax  # noqa: E402

from jaxserve.bench.engine import Case, EngineBench  # noqa: E402
from jaxserve.engine.load import load_parts  # noqa: E402
from jaxserve.settings import load_config  # noqa: E402


class JaxservePeer:
    """`jaxserve bench engine`'s cases, of given prompts."""

    def __init__(self, settings: list[str]) -> None:
        self._bench = EngineBench(load_config(settings=settings), load_parts)
        self._settings = settings

    def describe(self) -> str:
        """Version of JAX, and the settings; of the model's path only its name."""
        model, *settings = self._settings
        return f"jaxserve, jax {jax.__version__}, {' '.join([Path(model).name, *settings])}"

    def decode(self, prompts: list[list[int]], steps: int) -> Measured:
        """Timed between the first full step and `steps` later."""
        case = Case(kind="decode", rows=len(prompts), context=len(prompts[0]))
        sample = self._bench.run(case, steps, prompts)
        # Several steps may come in one call: as if exactly `steps` had been done.
        return steps * len(prompts) / sample.tokens_per_s, sample.outputs[: steps + 1]

    def prefill(self, prompt: list[int]) -> Measured:
        """From the prompt's arrival to its first token."""
        case = Case(kind="prefill", rows=1, context=len(prompt))
        sample = self._bench.run(case, 1, [prompt])
        return sample.seconds, sample.outputs


channel.serve(JaxservePeer([f"model.path={sys.argv[1]}", *sys.argv[3:]]))
