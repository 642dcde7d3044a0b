"""What outlives the observer, the server and the machine; and what happens when it cannot."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest

from jaxserve.protocol.records import Outcome
from jaxserve.telemetry.alerts.book import Book
from jaxserve.telemetry.alerts.incident import Change
from jaxserve.telemetry.slo.metrics import families
from jaxserve.telemetry.slo.report import report
from jaxserve.telemetry.slo.state import FILE
from tests.telemetry.slo.simulation import Clocks, S, Server

DONE, FAILED = Outcome.DONE, Outcome.FAILED
AVAILABLE = "availability > 99.9%"


def bad_and_good(server: Server, index: int = 0) -> tuple[int, int]:
    objective = server.objective(index)
    return objective["bad"], objective["good"]


def bad_in(server: Server, window: str) -> int:
    from jaxserve.telemetry.slo.burn import WINDOWS_S

    server.compliance.tick()
    return server.compliance.tallies()[0].count(WINDOWS_S[window]).bad


def test_a_restart_in_the_middle_of_a_window_loses_nothing(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE, "p99 ttft < 100 ms")
    server.run(100, DONE, FAILED)
    before = server.objective(0), server.objective(1)
    server.restart()
    after = server.objective(0), server.objective(1)
    assert after == before
    assert before[0]["bad"] == 100 and before[0]["alerts"]["page"]
    server.run(50, DONE, FAILED)
    assert bad_and_good(server) == (150, 150)
    assert len(server.alarm.pages) == 4  # of each objective one page, told in both lives
    server.clocks.advance(230)  # the first 100 s have begun to leave the 5 minutes
    assert 50 <= bad_in(server, "5m") < 80 and bad_in(server, "30m") == 150
    server.clocks.advance(28 * 86400)
    assert bad_and_good(server) == (0, 0)
    assert server.compliance.book.num_good_requests == 150


def test_time_that_the_server_was_down_passes(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    server.flush()
    server.clocks.advance(1900)
    server.restart(flushed=False)
    assert bad_in(server, "30m") == 0 and bad_in(server, "1h") == 20
    server.run(11)
    assert [firing for _, _, firing in server.alarm.pages] == [True, False]


def test_a_record_that_comes_again_after_a_restart_counts_once(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE)
    begun = server.begin()
    server.clocks.advance(1)
    record = server.end(begun)
    server.restart(same_server=True)
    server.compliance.begun(begun)
    server.compliance.ended(record)
    server.clocks.advance(60)
    assert bad_and_good(server) == (0, 1)
    assert not server.compliance.book.running


def test_what_was_not_flushed_comes_again_and_counts_once(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE)
    kept = server.end()
    server.flush()
    begun = server.begin()
    lost = server.end(begun)
    server.restart(same_server=True, flushed=False)  # it was killed
    for record in (kept, lost):
        server.compliance.ended(record)
    assert bad_and_good(server) == (0, 2)


def test_requests_run_on_through_a_restart_of_the_observer(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE)
    hanging, answered = server.begin(), server.begin()
    server.first_token(answered)
    server.restart(same_server=True)
    server.clocks.advance(8)
    assert bad_and_good(server) == (0, 0)  # workers may still have to say how they ended
    server.clocks.advance(5)
    assert bad_and_good(server) == (1, 0)
    server.end(hanging)
    server.end(answered)
    assert bad_and_good(server) == (0, 2)


def test_an_alert_that_goes_on_after_a_restart_stays_one_open_incident(tmp_path: Path):
    clocks, notices, state = Clocks(), [], None
    for _ in range(2):
        server = Server(tmp_path, AVAILABLE, clocks=clocks)
        book = Book(
            notices.append,
            monotonic=lambda: clocks.ns / 1e9,
            wall=clocks.wall_s,
            hold_s=60,
        )
        if state is not None:
            book.restore(state)

        def tell(key, firing, severity, title, details, book=book) -> None:
            book.on_alert(key, firing, "error", title)

        server.compliance.alerts.on_alert = tell
        for _ in range(700):  # longer than the book waits for somebody to speak of it
            server.run(1, Outcome.FAILED)
            book.tick()
        assert server.objective()["alerts"] == {"page": True, "ticket": True}
        assert len(book.open) == 2
        server.flush()
        server.compliance.close()
        state = book.state()
    assert [notice.change for notice in notices] == [Change.FIRING] * 2


def test_requests_end_with_their_server(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE, "p99 e2e < 2 s tenant=acme")
    server.begin(tenant="acme")
    server.begin(tenant="beta")
    server.restart()  # another server in the same place
    assert bad_and_good(server, 0) == (2, 0)
    assert bad_and_good(server, 1) == (1, 0)
    assert server.objective()["bad_by_cause"]["lost"] == 2
    server.restart()
    assert bad_and_good(server) == (2, 0)  # once


@pytest.mark.parametrize("step_s", [-86400.0, -30.0, 7200.0, 40 * 86400.0])
def test_a_step_of_the_wall_clock_moves_nothing(tmp_path: Path, step_s: float):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    server.clocks.wall_offset_s += step_s
    server.run(10, FAILED)
    assert bad_in(server, "5m") == 30
    server.clocks.wall_offset_s += step_s
    server.restart()  # the same boot: the monotonic clock says how long it took
    assert bad_in(server, "5m") == 30
    server.clocks.advance(310)
    assert bad_in(server, "5m") == 0 and bad_in(server, "30m") == 30


def test_after_another_boot_the_wall_clock_says_how_long_it_was(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    server.flush()
    server.clocks.reboot(1200)
    server.restart(flushed=False)
    assert bad_in(server, "5m") == 0 and bad_in(server, "30m") == 20


def test_a_clock_that_is_behind_after_a_boot_goes_on_from_what_was_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    server.flush()
    server.clocks.reboot(-3 * 86400)
    server.restart(flushed=False)
    assert "259200 s behind" in caplog.text
    assert bad_in(server, "5m") == 20
    server.run(15, FAILED)
    assert bad_in(server, "5m") == 35


# ---------------------------------------------------------------------------- objectives


def test_a_target_may_change_and_keeps_its_counts(tmp_path: Path):
    server = Server(tmp_path, "p99 ttft < 100 ms")
    server.run(50, DONE, FAILED)
    server.restart("p90 ttft < 100 ms period=7d")
    assert bad_and_good(server) == (50, 50)
    assert server.objective()["budget"]["allowed_bad"] == pytest.approx(10)
    server.run(11)
    assert server.objective()["alerts"] == {"page": False, "ticket": True}


def test_another_threshold_is_another_promise(tmp_path: Path):
    server = Server(tmp_path, "p99 ttft < 100 ms", AVAILABLE)
    server.run(20, FAILED)
    server.restart("p99 ttft < 200 ms", AVAILABLE)
    assert bad_and_good(server, 0) == (0, 0)
    assert bad_and_good(server, 1) == (20, 0)


def test_an_objective_that_is_removed_ends_its_alert_and_may_come_back(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    assert [firing for _, _, firing in server.alarm.pages] == [True]
    server.restart("p99 ttft < 100 ms")
    server.run(11)
    assert [firing for _, _, firing in server.alarm.pages] == [True, False]
    assert server.alarm.details[-1]["title"] == f"{AVAILABLE}: is no objective any more"
    server.restart(AVAILABLE)
    assert bad_and_good(server) == (20, 0)


# ---------------------------------------------------------------------------- the file


def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    server.flush()
    for number in (1, 2):
        server.compliance.close()
        (tmp_path / FILE).write_bytes(b"no database" * 1000)
        caplog.clear()
        server.restart(flushed=False)
        assert "counted anew" in caplog.text
        aside = f"{FILE}.damaged" if number == 1 else f"{FILE}.damaged-2"
        assert (tmp_path / aside).read_bytes().startswith(b"no database")
        assert bad_and_good(server) == (0, 0)
        assert server.compliance.file.problem == ""
    server.run(5, FAILED)
    server.restart()
    assert bad_and_good(server) == (5, 0)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE meta SET value = '99' WHERE key = 'version'",
        "DELETE FROM meta WHERE key = 'version'",
        "UPDATE counts SET counts = '[1, 2]'",
        "UPDATE counts SET counts = '[NaN, 0, 0, 0, 0, 0, 0, 0, 0, 0]' WHERE name != ''",
        "UPDATE counts SET counts = 'x'",
        "UPDATE meta SET value = '{}' WHERE key = 'instant'",
        "DROP TABLE running",
    ],
)
def test_what_makes_no_sense_is_set_aside(tmp_path: Path, damage: str):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    server.flush()
    server.compliance.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(damage)
    connection.close()
    server.restart(flushed=False)
    assert (tmp_path / f"{FILE}.damaged").exists()
    assert bad_and_good(server) == (0, 0)


@pytest.mark.parametrize("pragma", ["query_only = 1", "max_page_count = 1"])
def test_a_full_or_read_only_disk_stops_no_counting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pragma: str
):
    caplog.set_level(logging.WARNING)
    server = Server(tmp_path, AVAILABLE)
    server.run(20, DONE)
    server.flush()
    connection = server.compliance.file._connection
    connection.execute("VACUUM")
    connection.execute(f"PRAGMA {pragma}")
    for _ in range(3):
        server.run(400, *[FAILED] * 3)
        server.flush()
    assert bad_and_good(server) == (3600, 20)
    assert caplog.text.count("would not survive a restart") == 1
    problem = report(server.compliance)["kept"]["problem"]
    assert "full" in problem or "readonly" in problem
    kept = [f for f in families(server.compliance) if f.name == "jaxserve_slo_state_kept"]
    assert kept[0].samples[0].value == 0
    connection.execute("PRAGMA query_only = 0")
    connection.execute("PRAGMA max_page_count = 1000000")
    server.flush()
    assert report(server.compliance)["kept"]["problem"] is None
    server.restart()
    assert bad_and_good(server) == (3600, 20)


def test_a_directory_that_cannot_be_used_stops_nothing_and_is_used_later(tmp_path: Path):
    state = tmp_path / "state"
    server = Server(state, AVAILABLE)  # it does not exist
    server.run(20, FAILED)
    server.flush()
    assert "unable to open" in report(server.compliance)["kept"]["problem"]
    assert bad_and_good(server) == (20, 0)
    state.mkdir()
    server.flush()
    assert report(server.compliance)["kept"]["problem"] is None
    server.restart()
    assert bad_and_good(server) == (20, 0)


def test_old_counts_are_removed_from_the_file(tmp_path: Path):
    server = Server(tmp_path, AVAILABLE)
    server.run(20, FAILED)
    server.flush()
    server.clocks.advance(100 * 86400)
    server.restart()
    server.flush()
    rows = server.compliance.file._connection.execute("SELECT count(*) FROM counts").fetchone()
    assert rows == (0,)
    assert server.clocks.ns > 100 * 86400 * S
