"""One incident a cause, told once, over by itself."""

from __future__ import annotations

import json
import random

import pytest

from jaxserve.telemetry.alerts.book import MAX_HOLD_S, REASSERT_S, Book
from jaxserve.telemetry.alerts.incident import Change, Notice, Severity
from tests.fakes.clock import Clock


class Desk:
    """A book, and what it had told."""

    def __init__(self, **settings) -> None:
        self.notices: list[Notice] = []
        self.monotonic, self.wall = Clock(), Clock(1e9)
        self.book = Book(
            self.notices.append,
            monotonic=self.monotonic,
            wall=self.wall,
            **{"hold_s": 60.0} | settings,
        )

    def say(self, firing: bool, key: str = "slo", severity: Severity = Severity.ERROR, **more):
        self.book.on_alert(
            key, firing, severity, more.get("title", "too slow"), more.get("details")
        )

    def later(self, seconds: float) -> None:
        self.monotonic.advance(seconds)
        self.wall.advance(seconds)
        self.book.tick()

    @property
    def told(self) -> list[str]:
        return [notice.change for notice in self.notices]


def test_a_cause_is_told_once_and_is_over_once():
    desk = Desk()
    for _ in range(100):
        desk.say(True, details={"p99": "120 ms"})
        desk.later(1)
    assert desk.told == ["firing"]
    assert desk.notices[0].incident.details == {"p99": "120 ms"}
    for _ in range(100):
        desk.say(False)
        desk.later(1)
    assert desk.told == ["firing", "resolved"]
    incident = desk.notices[1].incident
    assert incident.ended_s - incident.started_s == pytest.approx(160, abs=2)
    assert desk.book.open == []
    assert desk.book.recent == [incident]


def test_what_never_fired_is_nothing():
    desk = Desk()
    desk.say(False)
    desk.later(100)
    assert desk.notices == []


def test_two_causes_are_two_incidents():
    desk = Desk()
    desk.say(True, "a")
    desk.say(True, "b")
    assert [incident.key for incident in desk.book.open] == ["a", "b"]
    assert desk.told == ["firing", "firing"]


def test_worse_than_was_told_is_told_better_is_not():
    desk = Desk()
    for severity in (Severity.WARNING, Severity.CRITICAL, Severity.INFO, Severity.CRITICAL):
        desk.say(True, severity=severity)
    assert desk.told == ["firing", "firing"]
    assert [notice.incident.severity for notice in desk.notices] == ["warning", "critical"]
    assert desk.book.open[0].severity is Severity.CRITICAL


def test_flapping_is_one_incident():
    desk = Desk()
    for second in range(600):
        desk.say(second % 20 < 10)
        desk.later(1)
    assert desk.told == ["firing"]


def test_slow_flapping_is_held_down_more_and_more():
    """With 90 s on and 90 s off for four hours: not 80 times two notices."""
    desk = Desk()
    for second in range(4 * 3600):
        desk.say(second % 180 < 90)
        desk.later(1)
    assert len(desk.notices) <= 6
    for _ in range(int(MAX_HOLD_S) + 10):
        desk.say(False)
        desk.later(1)
    assert desk.told[-1] == "resolved"


def test_reminders_come_where_they_are_asked_for():
    desk = Desk(resend_s=600)
    for _ in range(1900):
        desk.say(True)
        desk.later(1)
    assert desk.told == ["firing", "reminder", "reminder", "reminder"]


def test_notices_of_a_cause_alternate_whatever_happens():
    chance = random.Random(1)
    desk = Desk(hold_s=5.0)
    for _ in range(5000):
        desk.say(chance.random() < 0.3, chance.choice("abc"), chance.choice(list(Severity)))
        desk.later(chance.choice([0.1, 1, 30, 4000]))
    for key in "abc":
        told = [n for n in desk.notices if n.incident.key == key]
        opened = False
        for notice in told:
            if notice.change is Change.RESOLVED:
                assert opened
                opened = False
            else:
                opened = True
    assert len({notice.id for notice in desk.notices}) == len(desk.notices)


def test_open_incidents_are_so_after_a_restart_and_told_once():
    desk = Desk()
    desk.say(True, "a")
    desk.say(True, "b")
    after = Desk()
    after.book.restore(json.loads(json.dumps(desk.book.state())))
    for _ in range(int(REASSERT_S) + 10):
        after.say(True, "a")  # nobody watches b any more
        after.later(1)
    assert after.told == ["resolved"]
    assert after.notices[0].incident.key == "b"
    assert [incident.key for incident in after.book.open] == ["a"]


def test_a_cause_that_ended_while_the_server_was_down_is_over():
    desk = Desk()
    desk.say(True)
    after = Desk()
    after.book.restore(desk.book.state())
    for _ in range(62):
        after.say(False)
        after.later(1)
    assert after.told == ["resolved"]


def test_the_wall_clock_may_step_either_way():
    desk = Desk()
    desk.say(True)
    desk.wall.advance(-1e6)
    for _ in range(62):
        desk.say(False)
        desk.later(1)
    (incident,) = desk.book.recent
    assert incident.ended_s >= incident.started_s
    desk.say(True)
    desk.wall.advance(1e6)
    desk.later(1)
    assert len(desk.book.open) == 1  # how long it holds is no matter of the wall clock


def test_severities_may_be_given_as_plain_words():
    desk = Desk()
    desk.say(True, severity="critical")
    assert desk.notices[0].incident.severity is Severity.CRITICAL
    with pytest.raises(ValueError):
        desk.say(True, "other", severity="very bad")


def test_texts_are_cut_and_details_are_text():
    desk = Desk()
    desk.say(True, title="x" * 9999, details={f"n{i}": i for i in range(200)})
    (incident,) = desk.book.open
    assert len(incident.title) == 500
    assert len(incident.details) == 50 and incident.details["n1"] == "1"


@pytest.mark.parametrize("state", [{}, {"open": [{}], "recent": []}, {"open": 5, "recent": []}])
def test_a_broken_state_is_refused(state):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Desk().book.restore(state)
