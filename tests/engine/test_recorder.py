"""The flight recorder, as the engine writes it and its supervisor reads it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import recorder as recorder_module
from jaxserve.engine.loop import Engine
from jaxserve.engine.process import build_engine
from jaxserve.engine.recorder import FlightRecorder
from jaxserve.http.watchdog import hung, overdue
from jaxserve.protocol.flight import Cell, FlightFile, LastSteps
from tests.engine.test_loop import CONFIG, ListServer, submit, turn
from tests.fakes.engine import fake_parts
from tests.fakes.executor import FakeExecutor

LIMITS = EngineConfig(step_timeout_s=100.0, step_deadline_factor=10.0, step_deadline_floor_s=2.0)
S = 1_000_000_000


class Clock:
    """The recorder's clock."""

    def __init__(self) -> None:
        self.ns = 1000 * S

    def monotonic_ns(self) -> int:
        return self.ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the machine's."""
    made = Clock()
    monkeypatch.setattr(recorder_module, "time", made)
    return made


@pytest.fixture
def flight(tmp_path: Path) -> FlightFile:
    """The supervisor's side."""
    return FlightFile(tmp_path / "flight", CONFIG.scheduler.max_rows)


def engine_of(flight: FlightFile) -> Engine:
    """An engine that writes it."""
    recorder = FlightRecorder(flight.path, LIMITS, CONFIG.scheduler.max_rows, 1)
    engine = build_engine(CONFIG, ListServer(), fake_parts(CONFIG, lambda *_: None), recorder)
    recorder.serving()
    return engine


def request(number: int, **values: Any) -> Any:
    """A request that has a key."""
    return dataclasses.replace(submit([number], [5, number], **values), request_key=key(number))


def key(number: int) -> str:
    """Its key; large, as keys are."""
    return f"{2**63 + number:016x}"


def test_the_last_two_steps_name_their_requests(flight: FlightFile) -> None:
    engine = engine_of(flight)
    assert flight.last_steps() == LastSteps(serving=True)
    turn(engine, "a", request(1, max_tokens=3), request(2, max_tokens=30))
    turn(engine, "a", request(3, max_tokens=30))
    assert flight.last_steps().requests == {key(1), key(2), key(3)}
    for _ in range(3):
        turn(engine)
    assert flight.last_steps().requests == {key(2), key(3)}
    # A slot changes hands: each step knows whose it was then.
    turn(engine, "a", request(4, max_tokens=2))
    turn(engine)
    turn(engine)
    turn(engine)
    turn(engine, "a", request(5, max_tokens=30))
    assert flight.last_steps().requests == {key(2), key(3), key(5)}


def test_a_request_that_ends_the_engine_as_it_comes_in_is_named(flight: FlightFile) -> None:
    engine = engine_of(flight)

    def submit_fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("as if the process ended here")

    engine.scheduler.submit = submit_fails
    with pytest.raises(RuntimeError):
        turn(engine, "a", request(7))
    assert flight.last_steps().requests == {key(7)}


def test_deadlines_are_scaled_by_the_program_and_read_from_outside(
    flight: FlightFile, clock: Clock
) -> None:
    engine = engine_of(flight)
    started_ns = clock.ns
    assert isinstance(engine.executor, FakeExecutor)
    took_ns = 0
    collect = engine.executor.collect

    def slow(launched: Any) -> Any:
        clock.ns += took_ns
        return collect(launched)

    engine.executor.collect = slow

    def late(after_s: float) -> str | None:
        return overdue(flight, LIMITS, clock.ns + int(after_s * S), started_ns)

    turn(engine, "a", request(1, max_tokens=50))
    assert late(99.9) is None  # nothing measured yet: the full timeout
    assert late(100.1) == "a step is 0.1 s over its deadline"
    took_ns = 3 * S // 10
    turn(engine)
    # The chunk of two tokens took 0.3 s; a decode step of one counts as that, until measured.
    assert late(4.9) is None and late(5.1) == "a step is 0.1 s over its deadline"
    took_ns = S // 10
    for _ in range(3):
        turn(engine)
    assert late(2.9) is None and late(3.1) is not None
    took_ns = 20 * S
    turn(engine)
    assert late(99.9) is None and late(100.1) is not None  # never more than the timeout
    took_ns = 0
    while engine.scheduler.has_work:
        turn(engine)
    assert late(2.9) is None  # nothing runs: the loop must turn
    assert late(3.1) == "the engine's loop has not turned for 3.1 s"
    assert flight.largest == (2, 3 * S // 10)


def test_another_life_starts_from_what_was_measured(tmp_path: Path, clock: Clock) -> None:
    flight = FlightFile(tmp_path / "flight", CONFIG.scheduler.max_rows)
    flight.start_from((4, S))
    engine = engine_of(flight)
    turn(engine, "a", request(1))
    assert flight.get(Cell.DEADLINE_NS) == clock.ns + 12 * S  # of two tokens: as of four
    flight = FlightFile(tmp_path / "flight", CONFIG.scheduler.max_rows)
    flight.start_from((1, S))
    turn(engine_of(flight), "a", request(1))
    assert flight.get(Cell.DEADLINE_NS) == clock.ns + 22 * S  # of one token: scaled up


def test_start_up_has_its_own_time(tmp_path: Path) -> None:
    flight = FlightFile(tmp_path / "flight", 4)
    assert overdue(flight, LIMITS, 150 * S, 60 * S) is None
    assert overdue(flight, LIMITS, 161 * S, 60 * S) == (
        "the engine has not stirred for 101.0 s of its start"
    )
    short = EngineConfig(step_timeout_s=1.0)  # importing takes longer
    assert overdue(flight, short, 119 * S, 60 * S) is None
    assert overdue(flight, short, 121 * S, 60 * S) is not None


def test_the_watch_takes_several_looks(tmp_path: Path) -> None:
    """An engine that is late once and then goes on is left alone."""
    flight = FlightFile(tmp_path / "flight", 4)
    writer = FlightRecorder(flight.path, LIMITS, 4, 1)
    writer.serving()
    looks = []
    get = flight.get

    def look(cell: Cell) -> int:
        if cell is Cell.DEADLINE_NS:
            looks.append(cell)
            return 0 if len(looks) == 2 else 1  # long past, but for once
        return get(cell)

    flight.get = look
    before_s = time.monotonic()
    sentence = asyncio.run(asyncio.wait_for(hung(flight, LIMITS), 30))
    assert "over its deadline" in sentence
    assert len(looks) >= 5 and time.monotonic() - before_s < 25


def test_the_file_goes_with_its_supervisor(flight: FlightFile) -> None:
    engine = engine_of(flight)
    flight.close()
    assert not flight.path.exists()
    turn(engine, "a", request(1))  # the engine does not mind
