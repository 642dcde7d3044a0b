"""Nothing is lost that was acknowledged, and nothing counted twice, whatever goes wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from jaxserve.errors import LedgerUnavailable
from jaxserve.metering.ledger.book import FILE, Ledger, database_at
from jaxserve.metering.ledger.postgres import Postgres
from jaxserve.metering.ledger.query import Interval, Query
from jaxserve.metering.ledger.sqlite import Sqlite
from tests.metering.ledger.conftest import new_schema
from tests.metering.ledger.entries import NOVEMBER_HOUR, charged, entry, line, month_of_entries
from tests.metering.ledger.postgres_server import PostgresServer

ALL = Query(start_hour=NOVEMBER_HOUR, end_hour=NOVEMBER_HOUR + 24, interval=Interval.ALL)
TIMEOUT_S = 60


def tell(address: str | Path, first: int, *options: str) -> subprocess.Popen[str]:
    """A process that adds to a ledger."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.metering.ledger.teller", address, str(first), *options],
        stdout=subprocess.PIPE,
        text=True,
    )


def check_whole(ledger: Ledger, at_least: int) -> int:
    """Whether rows, sums and lines say the same; returns how many requests there are."""
    (usage,) = ledger.usage(ALL)
    count = usage.num_requests
    assert count >= at_least
    entries = [entry(number) for number in range(count)]
    assert {"acme": usage.cost} == charged(entries) == ledger.month_totals("2026-11")
    (of_lines,) = ledger.lines(ALL)
    assert of_lines.cost == Decimal("0.25") * count
    assert ledger.add(entries, [line(number + 1) for number in range(count)]) == 0
    return count


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_killed_in_the_middle_of_adds(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    if kind == "sqlite":
        address = str(tmp_path / FILE)
    else:
        address = new_schema(request.getfixturevalue("postgres"))
    ledger = Ledger(database_at(address, tmp_path))
    count = 0
    for life in range(4):
        teller = tell(address, count)
        assert teller.stdout is not None
        told = 0
        for _ in range(3 + 7 * life):
            told = int(teller.stdout.readline())
        teller.kill()
        teller.wait()
        told = max([told, *map(int, teller.stdout.read().split())])
        teller.stdout.close()
        count = check_whole(ledger, told)
        assert count - told <= 5  # what was committed as it died, and not yet told
    assert count > 150
    ledger.close()


# ---------------------------------------------------------------------------- files


def test_a_full_disk(tmp_path: Path):
    """The kernel lets no file grow; reports go on, and so do adds once there is room."""
    path = tmp_path / FILE
    teller = tell(path, 0, "--max-bytes", "1000000")
    out, _ = teller.communicate(timeout=TIMEOUT_S)
    *told, last = out.splitlines()
    assert last.startswith(f"unavailable: the ledger {path} cannot be used: ")
    ledger = Ledger(Sqlite(path))
    count = check_whole(ledger, int(told[-1]))
    assert count == int(told[-1]) > 50
    ledger.add([entry(number) for number in range(count, count + 50)])
    assert ledger.usage(ALL)[0].num_requests == count + 50
    ledger.close()


def test_full_in_the_middle_of_a_transaction_keeps_none_of_it(tmp_path: Path):
    database = Sqlite(tmp_path / FILE)
    ledger = Ledger(database)
    ledger.add([entry(0)], [line(1)])
    assert database._writer is not None
    ((pages,),) = database._writer.execute("PRAGMA page_count").fetchall()
    database._writer.execute(f"PRAGMA max_page_count = {pages + 5}")
    many = month_of_entries(2_000)
    with pytest.raises(LedgerUnavailable, match="database or disk is full"):
        ledger.add(many, [line(2)])
    assert (ledger.num_failures, ledger.up) == (1, False)
    assert ledger.usage(ALL)[0].num_requests == 1
    assert ledger.lines(ALL)[0].cost == Decimal("0.25")
    assert ledger.add(many, [line(2)]) == len(many)  # entry 0 is the first of them; there is room
    assert ledger.up
    ledger.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A directory that other users may enter."""
    folder = Path(tempfile.mkdtemp(prefix="jaxserve-ledger-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_read_only_ledger(open_folder: Path):
    path = open_folder / FILE
    ledger = Ledger(Sqlite(path))
    ledger.add([entry(number) for number in range(10)], [line(n + 1) for n in range(10)])
    if os.getuid() == 0:  # who may write everything
        teller = tell(path, 10, "--as", "65534")
    else:
        path.chmod(0o400)
        teller = tell(path, 10)
    out, _ = teller.communicate(timeout=TIMEOUT_S)
    assert out.startswith("unavailable: ") and "ermission denied" in out
    path.chmod(0o600)
    assert check_whole(ledger, 10) == 10
    ledger.close()


def test_a_damaged_ledger_is_left_alone_until_somebody_puts_a_whole_one_there(tmp_path: Path):
    path = tmp_path / FILE
    ledger = Ledger(Sqlite(path))
    ledger.add([entry(number) for number in range(300)], [line(n + 1) for n in range(300)])
    ledger.close()
    whole = path.read_bytes()
    damaged = whole[:100] + bytes(8_000) + whole[8_100:]
    path.write_bytes(damaged)
    with pytest.raises(LedgerUnavailable, match="malformed"):
        ledger.add([entry(300)], [line(301)])
    with pytest.raises(LedgerUnavailable, match="malformed"):
        ledger.usage(ALL)
    assert path.read_bytes() == damaged
    path.write_bytes(b"not a database at all" * 1_000)
    with pytest.raises(LedgerUnavailable, match="not a database"):
        ledger.add([entry(300)], [line(301)])
    path.write_bytes(whole)
    assert ledger.add([entry(300)], [line(301)]) == 2
    assert check_whole(ledger, 301) == 301
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(LedgerUnavailable, match="moved away"):
        ledger.add([entry(301)])
    assert ledger.add([entry(301)]) == 1  # where somebody will look for it
    ledger.close()


def test_somebody_else_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxserve.metering.ledger.sqlite._BUSY_S", 0.05)
    path = tmp_path / FILE
    ledger = Ledger(Sqlite(path))
    ledger.add([entry(0)])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ledger.close()
        with pytest.raises(LedgerUnavailable, match="locked"):
            ledger.add([entry(1)])
        other.execute("ROLLBACK")
    assert ledger.add([entry(1)]) == 1
    ledger.close()


def test_only_its_owner_may_read_it(tmp_path: Path):
    ledger = Ledger(Sqlite(tmp_path / "new" / FILE))
    ledger.add([entry(0)])
    assert (tmp_path / "new" / FILE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    ledger.close()


def test_reports_and_adds_do_not_wait_for_each_other(make_database):
    database = make_database()
    ledger = Ledger(database)
    ledger.add(month_of_entries(100))
    with database.reading() as report:  # a long one, which has begun
        before = report.execute("SELECT COUNT(*) FROM requests")
        assert ledger.add([entry(1_000)]) == 1
        assert report.execute("SELECT COUNT(*) FROM requests") == before == [(100,)]
    with database.writing() as session:  # a long add
        session.execute("DELETE FROM requests WHERE request_id = ?", [f"{1_000:032x}"])
        (usage,) = ledger.usage(ALL)
        assert usage.num_requests > 0


def test_a_report_that_takes_too_long_is_given_up(tmp_path: Path):
    database = Sqlite(tmp_path / FILE, read_timeout_s=0.05)
    Ledger(database).add([entry(0)])
    endless = (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n"
    )
    with pytest.raises(LedgerUnavailable, match="interrupted"), database.reading() as session:
        session.execute(endless)
    database.close()


# ---------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may end."""
    server = PostgresServer()
    server.start()
    yield server
    server.remove()


def test_postgres_is_away_for_a_while(own_postgres: PostgresServer):
    ledger = Ledger(Postgres(own_postgres.url))
    entries = [entry(number) for number in range(40)]
    lines = [line(number + 1) for number in range(40)]
    ledger.add(entries[:10], lines[:10])
    own_postgres.stop()
    for _ in range(3):  # as an observer does at each flush: what it has waits, and more comes
        with pytest.raises(LedgerUnavailable, match="PostgreSQL at 127"):
            ledger.add(entries[10:30], lines[10:30])
    with pytest.raises(LedgerUnavailable):
        ledger.usage(ALL)
    own_postgres.start()
    assert ledger.add(entries[10:], lines[10:]) == 60
    assert check_whole(ledger, 40) == 40
    ledger.close()


def test_a_ledger_may_be_away_when_the_server_starts(own_postgres: PostgresServer):
    own_postgres.stop()
    ledger = Ledger(Postgres(own_postgres.url))
    with pytest.raises(LedgerUnavailable):
        ledger.add([entry(0)])
    own_postgres.start()
    assert ledger.add([entry(0)]) == 1
    ledger.close()


class _Wire:
    """Between a client and PostgreSQL: may cut connections just after a commit, or fall silent.

    Attributes:
        cut_commit: the next COMMIT reaches the server, and its answer nobody.
        silent: nothing passes, and nothing is closed.
    """

    def __init__(self, port: int) -> None:
        self.cut_commit = threading.Event()
        self.silent = threading.Event()
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    thread = threading.Thread(target=self._pass_on, args=[source, target])
                    thread.start()
                    self._threads.append(thread)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if self.silent.is_set():
                    continue
                if b"COMMIT" in data and self.cut_commit.is_set():
                    source.shutdown(socket.SHUT_RDWR)  # its answer finds nobody
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends all of it."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in (*self._sockets, self._listener):
            one.close()


@pytest.fixture
def wire(postgres: PostgresServer) -> Iterator[_Wire]:
    """To the server of all tests."""
    made = _Wire(postgres.port)
    yield made
    made.close()


def test_a_commit_whose_acknowledgement_is_lost_is_counted_once(
    postgres: PostgresServer, wire: _Wire
):
    url = new_schema(postgres)
    ledger = Ledger(Postgres(url.replace(str(postgres.port), str(wire.port))))
    near = Ledger(Postgres(url))
    ledger.add([entry(0)], [line(1)])
    wire.cut_commit.set()
    entries, lines = [entry(n) for n in range(20)], [line(n + 1) for n in range(20)]
    with pytest.raises(LedgerUnavailable):
        ledger.add(entries, lines)
    wire.cut_commit.clear()
    deadline_s = time.monotonic() + TIMEOUT_S
    while near.usage(ALL)[0].num_requests == 1:  # the server commits in its own time
        assert time.monotonic() < deadline_s
    assert near.usage(ALL)[0].num_requests == 20  # it was kept, though nobody was told
    assert ledger.add(entries, lines) == 0
    assert check_whole(ledger, 20) == 20
    ledger.close()
    near.close()


def test_a_server_that_is_silent_is_given_up(postgres: PostgresServer, wire: _Wire):
    url = new_schema(postgres).replace(str(postgres.port), str(wire.port))
    ledger = Ledger(Postgres(url, timeout_s=0.5))
    ledger.add([entry(0)])
    wire.silent.set()
    with pytest.raises(LedgerUnavailable):
        ledger.add([entry(1)])
    wire.silent.clear()
    assert ledger.add([entry(1)]) == 1
    ledger.close()


def test_what_came_in_a_long_outage_is_added_in_pieces(
    make_database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxserve.metering.ledger.book._ADD_ROWS", 100)
    database = make_database()
    ledger = Ledger(database)
    writing, sizes = database.writing, []

    @contextlib.contextmanager
    def failing(**options):
        if len(sizes) == 3:
            raise LedgerUnavailable("gone again")
        with writing(**options) as session:
            yield session
        sizes.append(ledger.usage(ALL)[0].num_requests)

    ledger.add([entry(0)])
    monkeypatch.setattr(database, "writing", failing)
    entries = [entry(number) for number in range(450)]
    with pytest.raises(LedgerUnavailable, match="gone again"):
        ledger.add(entries, [line(number) for number in range(1, 451)])
    assert sizes == [100, 200, 300]
    monkeypatch.setattr(database, "writing", writing)
    assert ledger.add(entries, [line(number) for number in range(1, 451)]) == 300
    assert check_whole(ledger, 450) == 450
