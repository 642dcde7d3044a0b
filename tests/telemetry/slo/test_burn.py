"""Who is woken, when, and who is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.protocol.records import Outcome
from jaxserve.telemetry.slo.judge import Verdict
from tests.telemetry.slo.simulation import S, Server

DONE, FAILED = Outcome.DONE, Outcome.FAILED


def settled(directory: Path, *objectives: str, rate: int = 2) -> Server:
    """A server that has answered well for four days."""
    server = Server(directory, *objectives)
    for tally in server.compliance.tallies():
        for age_s in range(4 * 86400, 0, -5):
            at_s = server.compliance.now_s + 4 * 86400 - age_s
            tally.fine.add(at_s, Verdict.GOOD, 5 * rate)
            tally.coarse.add(at_s, Verdict.GOOD, 5 * rate)
    server.clocks.advance(4 * 86400)
    server.compliance.tick()
    assert server.objective()["good"] == 4 * 86400 * rate
    return server


def test_one_error_in_20_requests_pages_nobody(tmp_path: Path):
    server = Server(tmp_path, "error_rate < 0.1%", "availability > 99.9%")
    for number in range(20):
        server.end(outcome=FAILED if number == 7 else DONE)
        server.run(170)
    assert server.objective()["burn_rates"]["1h"] == pytest.approx(50)
    assert not server.alarm.told


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.SHED, Outcome.EXPIRED])
@pytest.mark.parametrize("rate", [1, 5])
def test_a_total_outage_pages_within_60_s(tmp_path: Path, outcome: Outcome, rate: int):
    server = settled(tmp_path, "availability > 99.9%", rate=rate)
    outage_ns = server.clocks.ns
    server.run(60, *[outcome] * rate)
    ((at_ns, key, firing),) = server.alarm.pages
    assert key == "slo page: availability > 99.9%" and firing
    assert 50 <= (at_ns - outage_ns) / S <= 60
    details = server.alarm.details[0]
    assert details["severity"] == "page"
    assert details["title"] == (
        "availability > 99.9%: the error budget burns more than 14.4x over 1h and 5m"
    )
    assert details["burn_rates"]["1h"] >= 14.4


@pytest.mark.parametrize("rate", [1, 5])
def test_a_hang_pages_within_60_s(tmp_path: Path, rate: int):
    server = settled(tmp_path, "availability > 99.9%", rate=rate)
    hang_ns = server.clocks.ns
    begun = []
    for _ in range(60):
        begun += [server.begin() for _ in range(rate)]
        server.clocks.advance(1)
        server.compliance.tick()
    ((at_ns, key, firing),) = server.alarm.pages
    assert key == "slo page: availability > 99.9%" and firing
    assert (at_ns - hang_ns) / S <= 60
    for request in begun:  # it goes on: all are answered, and nothing was lost but time
        server.end(request)
    server.compliance.tick()
    assert [firing for _, _, firing in server.alarm.pages] == [True, False]
    assert server.objective()["bad"] == 0


def test_a_fresh_server_that_only_fails_pages_within_60_s(tmp_path: Path):
    server = Server(tmp_path, "p99 ttft < 100 ms")
    server.run(60, FAILED)
    assert len(server.alarm.pages) == 1


def test_a_page_ends_when_the_short_window_is_well(tmp_path: Path):
    server = settled(tmp_path, "availability > 99.9%")
    server.run(120, FAILED, FAILED)
    assert len(server.alarm.pages) == 1
    server.run(290, DONE, DONE)
    # 6x over 6 h and 30 m still holds: it is the same page, and it stays on.
    assert len(server.alarm.pages) == 1 and server.objective()["alerts"]["page"]
    server.run(1800, DONE, DONE)
    assert [firing for _, _, firing in server.alarm.pages] == [True, False]
    assert server.alarm.details[-1]["title"] == "availability > 99.9%: kept again"


def test_a_slow_burn_is_a_ticket_and_no_page(tmp_path: Path):
    server = Server(tmp_path, "error_rate < 1%")
    for number in range(7 * 360):  # seven hours, one request in 10 s, 2% fail
        server.end(outcome=FAILED if number % 50 == 0 else DONE)
        server.run(10)
    assert [key for _, key, _ in server.alarm.told] == ["slo ticket: error_rate < 1%"]
    assert server.objective()["alerts"] == {"page": False, "ticket": True}


def test_no_traffic_is_no_alarm_and_no_nan(tmp_path: Path):
    server = settled(tmp_path, "availability > 99.9%", "p99 ttft < 100 ms")
    server.run(7200)
    assert not server.alarm.told
    for index in range(2):
        assert server.objective(index)["burn_rates"]["5m"] == 0
        assert server.objective(index)["compliance_percent"] == 100
        assert server.objective(index)["budget"]["left_share"] == 1


def test_what_clients_do_wrong_or_break_off_burns_nothing(tmp_path: Path):
    server = Server(tmp_path, "availability > 99.9%", "p99 e2e < 10 s")
    server.run(300, Outcome.REFUSED, Outcome.LIMITED, Outcome.LEFT)
    assert not server.alarm.told
    objective = server.objective()
    assert objective["bad"] == 0
    apart = objective["not_counted"]
    assert (apart["refused"], apart["limited"], apart["cancelled"]) == (300, 300, 300)


def test_few_bad_requests_are_enough_where_the_configuration_says_so(tmp_path: Path):
    server = Server(tmp_path, "error_rate < 0.1%", min_bad_events=1)
    server.run(30, DONE)
    server.run(1, FAILED)
    assert len(server.alarm.pages) == 1
