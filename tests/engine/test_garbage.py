"""When the garbage collector runs: when there is time for it, and never by itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from jaxserve.config import CacheConfig, Config, SchedulerConfig
from jaxserve.engine.garbage import (
    ALL_AT_LEAST_EVERY_S,
    ALL_EVERY_S,
    YOUNG,
    GarbageCollector,
)
from jaxserve.engine.process import build_engine
from tests.engine.test_loop import ListServer, submit, turn
from tests.fakes.engine import fake_parts


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


class World:
    """A collector that is taken over, with a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.generations: list[int] = []
        self.collector = GarbageCollector(lambda: self.now_s)
        gc.callbacks.append(self.note)

    def note(self, phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            self.generations.append(about["generation"])


@pytest.fixture
def world() -> Iterator[World]:
    """It; afterwards the process is as it was."""
    world = World()
    yield world
    gc.callbacks.remove(world.note)
    gc.unfreeze()
    gc.enable()


def cycle() -> weakref.ref[Node]:
    """A cycle that nobody holds."""
    return weakref.ref(Node())


def containers(number: int) -> list[list[int]]:
    """So many containers that live."""
    return [[] for _ in range(number)]


def test_by_itself_nothing_is_collected(world: World):
    lost = cycle()
    kept = containers(3 * YOUNG)
    assert world.generations == [] and lost() is not None
    assert len(kept) == 3 * YOUNG and not gc.isenabled()


def test_what_lived_before_is_not_visited(world: World):
    assert gc.get_freeze_count() > 1000


def test_what_came_is_collected_beside_the_device_once_it_is_much(world: World):
    lost = cycle()
    world.collector.launched()
    assert world.generations == [] and lost() is not None
    kept = containers(YOUNG + 1)
    world.collector.launched()
    assert world.generations == [1] and lost() is None
    world.collector.launched()
    assert world.generations == [1] and len(kept) == YOUNG + 1


def test_all_is_collected_in_idle_time_but_not_always(world: World):
    lost = cycle()
    gc.collect(1)  # it was alive when somebody looked
    late = cycle()
    world.now_s += ALL_EVERY_S - 0.1
    world.collector.idle()
    assert late() is not None
    world.now_s += 0.2
    world.collector.idle()
    world.collector.idle()
    assert world.generations == [1, 2] and lost() is None and late() is None


def test_a_busy_engine_collects_all_now_and_then(world: World):
    kept = containers(YOUNG + 1)
    world.now_s += ALL_AT_LEAST_EVERY_S + 0.1
    world.collector.launched()
    assert world.generations == [2]
    kept += containers(YOUNG + 1)
    world.collector.launched()
    assert world.generations == [2, 1]


class Told:
    """A collector that notes what it is told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def launched(self) -> None:
        self.words.append("launched")

    def idle(self) -> None:
        self.words.append("idle")


def test_the_loop_tells_of_each_launch_and_of_idle_time():
    config = Config(
        cache=CacheConfig(page_size=4, num_pages=20),
        scheduler=SchedulerConfig(max_rows=2, max_step_tokens=16, decode_steps=1),
    )
    told, server = Told(), ListServer()
    parts = fake_parts(config, lambda *_: None)
    engine = build_engine(config, server, parts, collector=told)
    turn(engine, "a", submit([1], [5, 6, 7], max_tokens=3))
    while engine.scheduler.has_work or engine.in_flight:
        turn(engine)
    assert told.words == ["launched"] * len(parts.executor.calls)
    receive = server.receive

    def stop_when_idle(timeout_s: float):
        engine.stop()
        return receive(timeout_s)

    server.receive = stop_when_idle
    engine.serve()
    assert told.words[-1] == "idle" and told.words.count("idle") == 1
