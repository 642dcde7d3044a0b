"""The flight recorder: what an engine was doing, for whoever watches its process.

A small file that the engine maps and writes (`engine.recorder`) and its supervisor maps and reads
(`http.watchdog`, `http.suspects`): it outlives the engine, however that ends, and can be read while
the engine stands still. Cells are unsigned 64-bit integers, each written at once.

    head: phase, when the loop last turned, the deadline of the oldest step that runs,
          the request whose message is being taken in, trials that are over,
          the largest measured step (tokens, nanoseconds), which the next engine starts from
    the requests on trial (engine.probation)
    the last two steps launched: number of requests, their numbers

Requests appear by number: their `request_key`, read as hexadecimal. Times are CLOCK_MONOTONIC
nanoseconds.
"""

from __future__ import annotations

import enum
import mmap
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import Config

CELL_BYTES = 8
#: Steps that may be under way: one is launched while the one before it runs.
NUM_STEPS = 2


class Cell(enum.IntEnum):
    """Places of the head."""

    PHASE = 0
    TURNED_NS = 1
    DEADLINE_NS = 2
    ARRIVING = 3
    TRIALS_DONE = 4
    LARGEST_TOKENS = 5
    LARGEST_NS = 6


def flight_requests(config: Config) -> int:
    """Requests that one step may hold at most: its rows, or its texts, each of its own request."""
    rows = config.scheduler.max_rows * config.parallel.data
    texts = config.embeddings.embed_tokens if config.embeddings.model else 0
    return max(rows, texts)


class Phase(enum.IntEnum):
    """How far an engine has come."""

    STARTING = 0
    SERVING = 1


_HEAD = len(Cell)


@dataclass(frozen=True, slots=True)
class FlightLayout:
    """Where what is, for an engine of so many rows (of all copies of the model)."""

    max_rows: int

    @property
    def trial(self) -> int:
        """First cell of the requests on trial: their number, then they."""
        return _HEAD

    def step(self, place: int) -> int:
        """First cell of one of the steps' lists."""
        return _HEAD + (1 + place) * (1 + self.max_rows)

    @property
    def num_cells(self) -> int:
        """Of the file."""
        return self.step(NUM_STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastSteps:
    """What an engine that has ended was doing.

    Attributes:
        requests: keys of the requests in its last steps, and of the one that was just coming in.
        on_trial: keys of those on trial (`engine.probation`); `requests` may hold others too.
        trials_done: how many trials were over.
        serving: whether it had come to serve at all.
    """

    requests: frozenset[str] = frozenset()
    on_trial: frozenset[str] = frozenset()
    trials_done: int = 0
    serving: bool = False


class FlightFile:
    """The reader's view of a recorder's file, which it makes.

    Args:
        path: of the file; replaced if it is there.
        max_rows: rows of the engine, of all copies of its model.
    """

    def __init__(self, path: Path, max_rows: int) -> None:
        self.path = path
        self._layout = FlightLayout(max_rows)
        path.unlink(missing_ok=True)  # an earlier life may still have it mapped
        path.write_bytes(bytes(CELL_BYTES * self._layout.num_cells))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._map).cast("Q")

    def get(self, cell: Cell) -> int:
        """One of the head's cells."""
        return self._cells[cell]

    def start_from(self, largest: tuple[int, int]) -> None:
        """Tells the engine that will write it of the largest step measured before."""
        self._cells[Cell.LARGEST_TOKENS], self._cells[Cell.LARGEST_NS] = largest

    @property
    def largest(self) -> tuple[int, int]:
        """Tokens and nanoseconds of the largest step measured; zeros before one."""
        return self.get(Cell.LARGEST_TOKENS), self.get(Cell.LARGEST_NS)

    def last_steps(self) -> LastSteps:
        """What the engine, which has ended, was doing."""
        layout = self._layout
        requests = {self.get(Cell.ARRIVING)}
        for place in range(NUM_STEPS):
            requests.update(self._list(layout.step(place)))
        return LastSteps(
            requests=_keys(requests),
            on_trial=_keys(self._list(layout.trial)),
            trials_done=self.get(Cell.TRIALS_DONE),
            serving=self.get(Cell.PHASE) == Phase.SERVING,
        )

    def close(self) -> None:
        """Lets go of the file and removes it."""
        self._cells.release()
        self._map.close()
        self.path.unlink(missing_ok=True)

    def _list(self, start: int) -> list[int]:
        count = min(self._cells[start], self._layout.max_rows)
        return list(self._cells[start + 1 : start + 1 + count])


def _keys(numbers: set[int] | list[int]) -> frozenset[str]:
    return frozenset(f"{number:016x}" for number in numbers if number)
