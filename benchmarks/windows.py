"""Two batches that decode in windows of a few steps, one's after the other's, in turns.

A shared machine drifts within seconds: runs of a whole batch each, compared, tell its drift and not
the difference of two arms. Each batch is on a load of its own, since both are in the middle of
their sequences; loads are not equally fast, so the arms change them from batch to batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.decoded import WARM_STEPS, Decoded
from benchmarks.turned import Turned
from jaxserve.protocol.messages import TokenEvents
from jaxserve.types import SamplingParams

#: Tokens of each row in a window; a multiple of `scheduler.decode_steps`.
WINDOW = 8


class Batch:
    """Rows that decode side by side, all begun.

    Args:
        samplings: of each row; long enough for all windows.
    """

    def __init__(
        self, engine: Turned, prompt: list[int], samplings: Sequence[SamplingParams]
    ) -> None:
        self._engine = engine
        self._ids = [engine.submit(prompt, sampling) for sampling in samplings]
        self._turn(WARM_STEPS + WINDOW)
        engine.settle()

    def window(self) -> Decoded:
        """`WINDOW` more tokens of each row; nothing runs before and after."""
        begun_ns, begun_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        self._turn(WINDOW)
        self._engine.settle()
        return Decoded(
            (time.perf_counter_ns() - begun_ns) / WINDOW,
            (time.process_time_ns() - begun_cpu_ns) / WINDOW,
        )

    def finish(self) -> None:
        """Ends the rows."""
        self._engine.finish(*self._ids)

    def _turn(self, num_tokens: int) -> None:
        """Turns until each row has so many more; as many are launched as are delivered."""
        left = num_tokens * len(self._ids)
        while left > 0:
            for message in self._engine.turn():
                if isinstance(message, TokenEvents):
                    for end in message.finished:
                        assert not end.error, end.error
                    left -= sum(map(len, message.token_ids))


def compare(
    engines: tuple[Turned, Turned],
    prompt: list[int],
    arms: tuple[Sequence[SamplingParams], Sequence[SamplingParams]],
    *,
    num_batches: int,
    num_windows: int,
) -> tuple[list[Decoded], list[Decoded]]:
    """The windows of each arm, the i-th of both one after the other; a batch before warms up."""
    found: tuple[list[Decoded], list[Decoded]] = ([], [])
    for number in range(-1, num_batches):
        loads = engines if number % 2 else engines[::-1]
        batches = [
            Batch(engine, prompt, samplings) for engine, samplings in zip(loads, arms, strict=True)
        ]
        for window in range(num_windows if number >= 0 else 1):
            for arm in (0, 1) if window % 2 else (1, 0):
                measured = batches[arm].window()
                if number >= 0:
                    found[arm].append(measured)
        for batch in batches:
            batch.finish()
    return found
