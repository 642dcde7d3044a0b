"""What is said of an engine that ends."""

from __future__ import annotations

from jaxserve.telemetry.alerts.engine import DOWN_S, LOOP_S, EngineWatch


class Told:
    """What was said last."""

    def __init__(self) -> None:
        self.firing = False
        self.title = ""
        self.details = {}

    def __call__(self, key, firing, severity, title, details=None) -> None:
        assert (key, severity) == ("engine", "critical")
        self.firing, self.title, self.details = firing, title, details


def test_one_quick_restart_is_nobodys_business():
    told = Told()
    watch = EngineWatch(told)
    watch.down(100.0)
    watch.tick(101.0)
    assert not told.firing
    watch.ready()
    watch.tick(100 + DOWN_S + 1)
    assert not told.firing


def test_a_long_one_is_until_it_is_ready():
    told = Told()
    watch = EngineWatch(told)
    watch.down(100.0)
    watch.tick(100 + DOWN_S)
    assert told.firing and told.title == "The engine is down"
    watch.ready()
    watch.tick(200.0)
    assert not told.firing


def test_ends_again_and_again_are_a_loop_until_they_stop():
    told = Told()
    watch = EngineWatch(told)
    for at_s in (100.0, 150.0, 200.0):
        watch.down(at_s)
        watch.ready()
    watch.tick(201.0)
    assert told.firing and "again and again" in told.title
    assert told.details == {"ends within 600 s": "3"}
    watch.tick(100 + LOOP_S + 1)
    assert not told.firing


def test_an_engine_that_is_given_up_is_at_once():
    told = Told()
    watch = EngineWatch(told)
    watch.failed("no such file", 100.0)
    watch.tick(100.0)
    assert told.firing and told.details["error"] == "no such file"
    watch.ready()
    watch.tick(101.0)
    assert not told.firing


def test_an_observer_that_begins_while_the_engine_is_down_ends_no_incident():
    said = []
    watch = EngineWatch(lambda *words: said.append(words[1]))
    watch.tick(100.0)  # it has heard nothing
    watch.away(101.0)
    watch.tick(102.0)  # for how long it is down is not known
    assert said == []
    watch.tick(101.0 + DOWN_S)
    watch.ready()
    watch.tick(200.0)
    assert said == [True, False]
