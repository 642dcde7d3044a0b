"""Keeps the book in a file, so that it survives the server: SQLite, written some times a minute.

One transaction holds the counts, the requests they are of, and the requests that run: after a
crash nothing is counted twice, and what had not been written comes again from the HTTP workers.
A file that is damaged or of another version is set aside. Where the disk is full or cannot be
written, counting goes on, and each `write` tries again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sqlite3
import threading
from dataclasses import dataclass, field
from pathlib import Path

from jaxserve.protocol.records import Begun
from jaxserve.telemetry.slo.book import COARSE_S, FINE_S, FINE_WINDOWS_S, Book, Running
from jaxserve.telemetry.slo.judge import Verdict
from jaxserve.telemetry.slo.objective import MAX_PERIOD_S
from jaxserve.telemetry.slo.series import Row, Series
from jaxserve.telemetry.slo.timeline import Instant

logger = logging.getLogger(__name__)

FILE = "slo.sqlite3"
VERSION = 1

#: The name of what is counted over all objectives.
_ALL = ""
_TABLES = {"meta", "counts", "totals", "counted", "running"}
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE counts (
  name TEXT, width_s INTEGER, bucket INTEGER, counts TEXT NOT NULL,
  PRIMARY KEY (name, width_s, bucket)
) WITHOUT ROWID;
CREATE TABLE totals (name TEXT PRIMARY KEY, counts TEXT NOT NULL);
CREATE TABLE counted (number INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL);
CREATE TABLE running (request_id TEXT PRIMARY KEY, begun TEXT NOT NULL, first_ns INTEGER NOT NULL);
"""
#: Writes between two removals of what is too old.
_PRUNE_EVERY = 300


class DamagedState(Exception):
    """The file holds something else than what was written."""


#: What reading a damaged file may raise.
_DAMAGE = (sqlite3.Error, DamagedState, ValueError, KeyError, TypeError)


@dataclass(kw_only=True)
class Snapshot:
    """What changed since the snapshot before, and what is written whole.

    Attributes:
        counts: by name and width, the changed buckets.
        counted: requests that were counted since.
        running: all that run.
        firing: keys of the alerts that are on.
        life: of the server that runs: its requests end with it.
    """

    instant: Instant
    life: str
    counts: dict[tuple[str, int], dict[int, Row]] = field(default_factory=dict)
    totals: dict[str, Row] = field(default_factory=dict)
    counted: list[str] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    firing: list[str] = field(default_factory=list)


class StateFile:
    """The file, from its making to `close`.

    Args:
        max_counted: requests whose record may come again, at most.

    Attributes:
        problem: why nothing can be kept at present; empty where all is well.
    """

    def __init__(self, directory: Path, max_counted: int) -> None:
        self.path = directory / FILE
        self.problem = ""
        self._max_counted = max_counted
        self._num_writes = 0
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()  # a flush that was cancelled still runs when the last begins

    def load(self) -> Snapshot | None:
        """What was written last; None where there is nothing."""
        try:
            return self._load()
        except sqlite3.OperationalError as error:
            self.note(error)
            return None
        except _DAMAGE as error:
            self._set_aside(error)
        try:
            return self._load()
        except _DAMAGE as error:
            self.note(error)
            return None

    def write(self, snapshot: Snapshot) -> None:
        """Makes a snapshot durable, in any thread.

        Raises:
            sqlite3.Error: it could not.
        """
        with self._lock, self._opened() as connection:  # one transaction
            _write(connection, snapshot)
            connection.execute(
                "DELETE FROM counted WHERE number <= (SELECT max(number) FROM counted) - ?",
                (self._max_counted,),
            )
            if self._num_writes % _PRUNE_EVERY == 0:
                for width_s, kept_s in ((FINE_S, max(FINE_WINDOWS_S)), (COARSE_S, MAX_PERIOD_S)):
                    oldest = int((snapshot.instant.at_s - kept_s) // width_s)
                    connection.execute(
                        "DELETE FROM counts WHERE width_s = ? AND bucket < ?", (width_s, oldest)
                    )
        self._num_writes += 1

    def _opened(self) -> sqlite3.Connection:
        """The file's connection; one that could not be read at the start may still be made."""
        if self._connection is None and self._load() is not None:
            self.close()
            raise sqlite3.OperationalError(
                "it could not be read at the start; the server goes on from it after a restart"
            )
        assert self._connection is not None
        return self._connection

    def note(self, error: Exception | None) -> None:
        """It could not be written, or read; or, with None, it could again."""
        if error is None:
            if self.problem:
                logger.warning("SLO counts are kept in %s again", self.path)
            self.problem = ""
            return
        problem = f"cannot keep SLO counts in {self.path}: {error}"
        if not self.problem:
            logger.warning("%s; they are counted on, and would not survive a restart", problem)
        self.problem = problem

    def close(self) -> None:
        """Lets go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _load(self) -> Snapshot | None:
        self.close()
        connection = sqlite3.connect(self.path, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            is_new = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if is_new:
                with connection:
                    connection.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
                    connection.execute("INSERT INTO meta VALUES ('version', ?)", (str(VERSION),))
                snapshot = None
            else:
                snapshot = _read(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return snapshot

    def _set_aside(self, error: Exception) -> None:
        """Makes room for a new file."""
        aside = self.path.with_name(f"{FILE}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{FILE}.damaged-{number}")
        try:
            for suffix in ("", "-wal", "-shm"):
                file = self.path.with_name(FILE + suffix)
                if file.exists():
                    file.rename(aside.with_name(aside.name + suffix))
        except OSError as obstacle:
            self.note(obstacle)
            return
        logger.warning(
            "%s is damaged, or of another version (%s): it is now %s, and SLOs are counted anew",
            self.path,
            error,
            aside.name,
        )


# ---------------------------------------------------------------------------- the book


def take_snapshot(book: Book, instant: Instant, life: str, firing: set[str]) -> Snapshot:
    """What must be written of a book; what could not be is given back by `return_snapshot`."""
    return Snapshot(
        instant=instant,
        life=life,
        counts={key: changed for key, series in _series(book) if (changed := series.changed())},
        totals=_totals(book),
        counted=book.counted(),
        running={
            request_id: dataclasses.replace(running) for request_id, running in book.running.items()
        },
        firing=sorted(firing),
    )


def return_snapshot(book: Book, snapshot: Snapshot) -> None:
    """Has the next snapshot hold what this one held."""
    for key, series in _series(book):
        series.unchanged(snapshot.counts.get(key, ()))
    book.uncounted(snapshot.counted)


def restore_book(book: Book, snapshot: Snapshot, life: str, at_s: float) -> None:
    """Fills a new book with what was kept.

    Args:
        life: of the server that runs now; requests that ran in another are lost.
        at_s: now, on the timeline.
    """
    for key, series in _series(book):
        series.advance(at_s)
        series.restore(snapshot.counts.get(key, {}))
    for name, tally in book.tallies.items():
        tally.totals = list(snapshot.totals.get(name, tally.totals))
    book.num_good_requests, book.num_good_tokens = snapshot.totals.get(_ALL, [0, 0])
    book.restored(frozenset(snapshot.counted))
    if snapshot.life == life:
        book.running = dict(snapshot.running)
    else:
        book.lost((running.begun for running in snapshot.running.values()), at_s)


def _series(book: Book) -> list[tuple[tuple[str, int], Series]]:
    """All series of a book, by name and width."""
    found = [((_ALL, FINE_S), book.goodput)]
    for name, tally in book.tallies.items():
        found += [((name, FINE_S), tally.fine), ((name, COARSE_S), tally.coarse)]
    return found


def _totals(book: Book) -> dict[str, Row]:
    totals = {name: list(tally.totals) for name, tally in book.tallies.items()}
    return totals | {_ALL: [book.num_good_requests, book.num_good_tokens]}


# ---------------------------------------------------------------------------- the file


def _write(connection: sqlite3.Connection, snapshot: Snapshot) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO counts VALUES (?, ?, ?, ?)",
        [
            (name, width_s, bucket, json.dumps(row))
            for (name, width_s), rows in snapshot.counts.items()
            for bucket, row in rows.items()
        ],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO totals VALUES (?, ?)",
        [(name, json.dumps(row)) for name, row in snapshot.totals.items()],
    )
    connection.executemany(
        "INSERT INTO counted (request_id) VALUES (?)", [(id,) for id in snapshot.counted]
    )
    connection.execute("DELETE FROM running")
    connection.executemany(
        "INSERT INTO running VALUES (?, ?, ?)",
        [
            (request_id, json.dumps(dataclasses.asdict(running.begun)), running.first_ns)
            for request_id, running in snapshot.running.items()
        ],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO meta VALUES (?, ?)",
        [
            ("instant", json.dumps(dataclasses.asdict(snapshot.instant))),
            ("life", snapshot.life),
            ("firing", json.dumps(snapshot.firing)),
        ],
    )


def _read(connection: sqlite3.Connection) -> Snapshot | None:
    """What the file holds.

    Raises:
        DamagedState: it is of another version, or its counts are none.
    """
    if (check := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise DamagedState(check)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if missing := _TABLES - tables:
        raise DamagedState(f"no table {', '.join(sorted(missing))}")
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if meta["version"] != str(VERSION):
        raise DamagedState(f"version {meta['version']}, not {VERSION}")
    if "instant" not in meta:
        return None  # made, and never written
    counts: dict[tuple[str, int], dict[int, Row]] = {}
    for name, width_s, bucket, row in connection.execute("SELECT * FROM counts"):
        columns = 3 if name == _ALL else len(Verdict)
        counts.setdefault((name, width_s), {})[bucket] = _row(row, columns)
    return Snapshot(
        instant=Instant(**json.loads(meta["instant"])),
        life=meta["life"],
        counts=counts,
        totals={
            name: _row(row, 2 if name == _ALL else len(Verdict))
            for name, row in connection.execute("SELECT name, counts FROM totals")
        },
        counted=[id for (id,) in connection.execute("SELECT request_id FROM counted")],
        running={
            request_id: Running(Begun(**json.loads(begun)), first_ns)
            for request_id, begun, first_ns in connection.execute("SELECT * FROM running")
        },
        firing=json.loads(meta["firing"]),
    )


def _row(text: str, columns: int) -> Row:
    row = json.loads(text)
    if not isinstance(row, list) or len(row) != columns or any(type(n) is not int for n in row):
        raise DamagedState(f"counts {text!r}")
    return row
