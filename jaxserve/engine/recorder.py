"""Writes the flight recorder (`protocol.flight`): which requests run, and a deadline for each step.

The engine's loop tells it of each turn, launch and result; whoever watches the process from outside
reads it, and kills an engine that is past its deadline: one that is stopped, or hangs inside a
device call, cannot watch itself.

A step's deadline is scaled by its bucket: `engine.step_deadline_factor` times the longest measured
step of the same program (of late: the measure fades), plus `engine.step_deadline_floor_s`. A
program that was not measured counts as the next larger one that was, or as the largest, scaled up
by its tokens; without any, in the very first step, `engine.step_timeout_s` holds. It counts from
when the step before it was read back, since steps run one after the other.

A launch costs two gathers of the rows' requests and two clocks, whatever they are.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.device.embed_step import EmbedProgram
from jaxserve.device.step import Program, StepInputs
from jaxserve.protocol.flight import NUM_STEPS, Cell, FlightLayout, Phase
from jaxserve.scheduler.plan import Plan

AnyProgram = Program | EmbedProgram

#: How much of a measured step's length stays after each further step of its program.
_FADING = 0.98


class Recorder(Protocol):
    """What the loop tells (`FlightRecorder`, or `NoRecorder` where nobody watches)."""

    def turned(self) -> None:
        """The loop turns, or start-up goes on."""
        ...

    def serving(self) -> None:
        """Start-up is over."""
        ...

    def arriving(self, request: int) -> None:
        """A request's message is being taken in; 0: none is any more."""
        ...

    def trying(self, requests: Iterable[int], trials_done: int) -> None:
        """These requests are on trial from now on, after so many trials."""
        ...

    def launching(self, plans: Sequence[Plan | None], inputs: Sequence[StepInputs]) -> None:
        """A step is about to be launched."""
        ...

    def embedding(self, requests: Iterable[int], program: AnyProgram) -> None:
        """A step of texts of these requests is about to be launched."""
        ...

    def collected(self) -> None:
        """The oldest launched step has been read back."""
        ...


class NoRecorder:
    """Nobody watches from outside: an engine in a thread, or a test's."""

    def turned(self) -> None:
        """See `Recorder`."""

    def serving(self) -> None:
        """See `Recorder`."""

    def arriving(self, request: int) -> None:
        """See `Recorder`."""

    def trying(self, requests: Iterable[int], trials_done: int) -> None:
        """See `Recorder`."""

    def launching(self, plans: Sequence[Plan | None], inputs: Sequence[StepInputs]) -> None:
        """See `Recorder`."""

    def embedding(self, requests: Iterable[int], program: AnyProgram) -> None:
        """See `Recorder`."""

    def collected(self) -> None:
        """See `Recorder`."""


class FlightRecorder:
    """Writes the file that `protocol.flight.FlightFile` made.

    Args:
        path: of the file.
        config: deadlines.
        max_rows: of each copy of the model.
        copies: of it.
        max_requests: that the file has room for in a step; the rows of all copies where 0.
    """

    def __init__(
        self, path: Path, config: EngineConfig, max_rows: int, copies: int, max_requests: int = 0
    ) -> None:
        self._layout = FlightLayout(max_requests or max_rows * copies)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = np.frombuffer(self._map, np.uint64)
        self._config = config
        self._owners = np.zeros((copies, max_rows + 1), np.uint64)  # by slot: the request's number
        self._longest_ns: dict[AnyProgram, float] = {}
        self._running: deque[tuple[AnyProgram, int]] = deque()  # program, when launched
        self._before = int(self._cells[Cell.LARGEST_TOKENS]), float(self._cells[Cell.LARGEST_NS])
        self._num_launched = 0
        self._free_ns = 0  # since when the device has nothing older to do
        self.turned()

    def turned(self) -> None:
        """See `Recorder`."""
        self._cells[Cell.TURNED_NS] = time.monotonic_ns()

    def serving(self) -> None:
        """See `Recorder`."""
        self.turned()
        self._cells[Cell.PHASE] = Phase.SERVING

    def arriving(self, request: int) -> None:
        """See `Recorder`."""
        self._cells[Cell.ARRIVING] = request

    def trying(self, requests: Iterable[int], trials_done: int) -> None:
        """See `Recorder`."""
        self._cells[Cell.TRIALS_DONE] = trials_done
        self._write(self._layout.trial, np.asarray(list(requests), np.uint64))

    def launching(self, plans: Sequence[Plan | None], inputs: Sequence[StepInputs]) -> None:
        """See `Recorder`."""
        requests = []
        for owners, plan, own in zip(self._owners, plans, inputs, strict=True):
            if plan is not None:
                for join in plan.joins:
                    owners[join.slot] = join.request
                requests.append(owners[own.rows[: own.num_live_rows]])
        self._launching(
            requests[0] if len(requests) == 1 else np.concatenate(requests), inputs[0].program
        )

    def embedding(self, requests: Iterable[int], program: AnyProgram) -> None:
        """See `Recorder`."""
        self._launching(np.asarray(list(requests), np.uint64), program)

    def _launching(self, requests: np.ndarray, program: AnyProgram) -> None:
        self._write(self._layout.step(self._num_launched % NUM_STEPS), requests)
        self._num_launched += 1
        now_ns = time.monotonic_ns()
        if not self._running:
            self._cells[Cell.DEADLINE_NS] = now_ns + self._allowed_ns(program)
        self._running.append((program, now_ns))

    def collected(self) -> None:
        """See `Recorder`."""
        program, launched_ns = self._running.popleft()
        now_ns = time.monotonic_ns()
        took_ns = now_ns - max(launched_ns, self._free_ns)
        self._free_ns = now_ns
        longest_ns = max(took_ns, _FADING * self._longest_ns.get(program, 0.0))
        self._longest_ns[program] = longest_ns
        if _tokens(program) >= self._cells[Cell.LARGEST_TOKENS]:
            self._cells[Cell.LARGEST_TOKENS] = _tokens(program)
            self._cells[Cell.LARGEST_NS] = int(longest_ns)
        self._cells[Cell.DEADLINE_NS] = (
            now_ns + self._allowed_ns(self._running[0][0]) if self._running else 0
        )

    def _allowed_ns(self, program: AnyProgram) -> int:
        """How long a step of this program may take."""
        config = self._config
        longest_ns = self._longest_ns.get(program) or self._estimated_ns(_tokens(program))
        if not longest_ns:
            return int(config.step_timeout_s * 1e9)
        scaled_s = config.step_deadline_factor * longest_ns / 1e9
        return int(min(config.step_timeout_s, scaled_s + config.step_deadline_floor_s) * 1e9)

    def _estimated_ns(self, tokens: int) -> float:
        """The longest step of a program that was not measured; 0 where none was."""
        measured = [(_tokens(program), ns) for program, ns in self._longest_ns.items()]
        measured.append(self._before)
        larger = [known for known in measured if known[0] >= tokens]
        if larger:
            return min(larger)[1]
        most, longest_ns = max(measured)
        return longest_ns * tokens / most if most else 0.0

    def _write(self, start: int, requests: np.ndarray) -> None:
        """A list of requests: its length last, so that a torn list is an empty one."""
        requests = requests[: self._layout.max_rows]
        self._cells[start] = 0
        self._cells[start + 1 : start + 1 + len(requests)] = requests
        self._cells[start] = len(requests)


def _tokens(program: AnyProgram) -> int:
    """Padded tokens of a call, by which programs are compared."""
    return program.num_tokens * program.decode_steps
