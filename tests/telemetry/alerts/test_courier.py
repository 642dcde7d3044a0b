"""Each notice reaches its receiver, in order, once it is there."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import pairwise

import pytest

from jaxserve.telemetry.alerts.courier import (
    LONGEST_PAUSE_S,
    MAX_QUEUED,
    MAX_REFUSALS,
    Courier,
    DeliveryError,
)
from jaxserve.telemetry.alerts.incident import Change, Incident, Notice, Severity
from tests.fakes.clock import Clock


class Receiver:
    """One that answers what a test says."""

    def __init__(self, least: Severity = Severity.WARNING, resend_s: float = 0.0) -> None:
        self.name, self.identity = "webhook 1", "webhook-1"
        self.least, self.resend_s = least, resend_s
        self.got: list[Notice] = []
        self.errors: deque[DeliveryError] = deque()
        self.away = False
        self.attempts = 0

    def send(self, notice: Notice) -> None:
        self.attempts += 1
        if self.away:
            raise DeliveryError("cannot be reached")
        if self.errors:
            raise self.errors.popleft()
        self.got.append(notice)


def notice(number: int = 1, severity: Severity = Severity.ERROR, change=Change.FIRING) -> Notice:
    incident = Incident(key="k", severity=severity, title="t", details={}, started_s=1.0)
    return Notice(id=str(number), change=change, incident=incident)


def test_what_was_told_while_it_was_away_comes_once_and_in_order():
    async def work() -> None:
        clock, receiver = Clock(), Receiver()
        courier = Courier(receiver, clock, chance=lambda: 1.0)
        receiver.away = True
        for number in range(5):
            courier.tell(notice(number))
        pauses = []
        for _ in range(3600):
            before = receiver.attempts
            await courier.deliver()
            if receiver.attempts > before:
                pauses.append(clock.now_s)
            clock.advance(1)
        assert len(courier.queue) == 5
        gaps = [b - a for a, b in pairwise(pauses)]
        assert gaps[:6] == [1, 2, 4, 8, 16, 32]
        assert set(gaps[6:]) == {LONGEST_PAUSE_S}
        receiver.away = False
        clock.advance(LONGEST_PAUSE_S)
        assert await courier.deliver()
        assert [n.id for n in receiver.got] == ["0", "1", "2", "3", "4"]
        assert not await courier.deliver()
        assert (courier.num_sent, courier.num_dropped) == (5, 0)

    asyncio.run(work())


def test_pauses_are_partly_chance():
    async def first_pause(chance: float) -> float:
        clock, receiver = Clock(0.0), Receiver()
        receiver.away = True
        courier = Courier(receiver, clock, chance=lambda: chance)
        courier.tell(notice())
        await courier.deliver()
        while receiver.attempts < 2:
            clock.advance(0.01)
            await courier.deliver()
        return clock.now_s

    assert asyncio.run(first_pause(0.0)) == pytest.approx(0.5, abs=0.02)
    assert asyncio.run(first_pause(1.0)) == pytest.approx(1.0, abs=0.02)


def test_it_is_asked_again_when_it_said():
    async def work() -> None:
        clock, receiver = Clock(), Receiver()
        courier = Courier(receiver, clock)
        receiver.errors.append(DeliveryError("429", retry_after_s=120))
        courier.tell(notice())
        await courier.deliver()
        clock.advance(119)
        await courier.deliver()
        assert receiver.attempts == 1
        clock.advance(1)
        await courier.deliver()
        assert [n.id for n in receiver.got] == ["1"]

    asyncio.run(work())


def test_one_that_is_refused_again_and_again_holds_up_no_other(caplog: pytest.LogCaptureFixture):
    async def work() -> None:
        clock, receiver = Clock(), Receiver()
        courier = Courier(receiver, clock)
        receiver.errors.extend(
            DeliveryError("status 400", refused=True) for _ in range(MAX_REFUSALS)
        )
        courier.tell(notice(1))
        courier.tell(notice(2))
        for _ in range(200):
            await courier.deliver()
            clock.advance(1)
        assert [n.id for n in receiver.got] == ["2"]
        assert courier.num_dropped == 1

    asyncio.run(work())
    assert "it is dropped" in caplog.text
    assert caplog.text.count("did not take an alert") == 1  # not once an attempt


def test_it_is_told_from_its_severity_on_and_no_more_than_fits():
    courier = Courier(Receiver(Severity.ERROR), Clock())
    courier.tell(notice(1, Severity.WARNING))
    assert not courier.queue
    for number in range(MAX_QUEUED + 10):
        courier.tell(notice(number))
    assert len(courier.queue) == MAX_QUEUED
    assert courier.queue[0].id == "10" and courier.num_dropped == 10


def test_one_that_forgets_is_told_again_of_what_is_open():
    async def work() -> None:
        clock, receiver = Clock(), Receiver(resend_s=60.0)
        opened = [notice().incident, notice(1, Severity.INFO).incident]
        courier = Courier(receiver, clock, lambda: opened)
        for _ in range(190):
            await courier.deliver()
            clock.advance(1)
        assert [n.change for n in receiver.got] == ["reminder"] * 3
        opened.clear()
        clock.advance(100)
        await courier.deliver()
        assert len(receiver.got) == 3

    asyncio.run(work())


def test_a_queue_goes_on_after_a_restart():
    async def work() -> None:
        first = Courier(Receiver(), Clock())
        first.tell(notice(1))
        first.tell(notice(2, change=Change.RESOLVED))
        receiver = Receiver()
        second = Courier(receiver, Clock())
        second.restore(first.state())
        await second.deliver()
        assert receiver.got == list(first.queue)

    asyncio.run(work())
