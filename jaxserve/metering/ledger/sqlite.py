"""The ledger in a file: SQLite with a write-ahead log.

Readers see the last committed state and make no writer wait. `synchronous=FULL`: a commit is on
the disk before `add` returns, since workers forget their reports then. That is one fsync for each
flush, a second apart; NORMAL would save it, and lose to a power cut everything since the last
checkpoint of the log, thousands of requests more than the flush interval that is promised.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError, LedgerUnavailable
from jaxserve.metering.ledger.database import Words, unavailable

#: How long to wait for another process that writes: a copy being made, someone's shell.
_BUSY_S = 5.0
#: Rows of one statement: its parameters stay below 32,766, the bound.
_INSERT_ROWS = 500
#: The first with RETURNING.
_OLDEST = (3, 35, 0)


class Sqlite:
    """See `database.Database`.

    Args:
        path: of the file; made, for its owner's eyes alone, where it is missing.
        read_timeout_s: a report that takes longer is given up.

    Raises:
        ConfigError: this Python's SQLite is too old.
    """

    words = Words(text="TEXT", clustered="WITHOUT ROWID")

    def __init__(self, path: Path, read_timeout_s: float = 20.0) -> None:
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ConfigError(
                f"metering.ledger needs SQLite {'.'.join(map(str, _OLDEST))} or newer, and this "
                f"Python has {sqlite3.sqlite_version}: use another Python, or PostgreSQL"
            )
        self.name = str(path)
        self._path = path
        self._read_timeout_s = read_timeout_s
        self._lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of what is open

    @contextmanager
    def writing(self, *, patient: bool = False) -> Iterator[_Session]:
        """See `Database`."""
        with self._lock:
            try:
                self._check_place()
                writer = self._writer = self._writer or self._open()
                writer.execute("BEGIN IMMEDIATE")
                yield _Session(writer)
                writer.execute("COMMIT")
            except sqlite3.Error as error:
                # A new connection next time: the file may have been replaced, the disk have room.
                self._close_writer()
                raise unavailable(self.name, error) from error
            except BaseException:
                self._close_writer()
                raise

    @contextmanager
    def reading(self) -> Iterator[_Session]:
        """See `Database`."""
        address = f"file:{urllib.parse.quote(str(self._path))}?mode=ro"
        try:
            with closing(
                sqlite3.connect(address, uri=True, timeout=_BUSY_S, isolation_level=None)
            ) as reader:
                timer = threading.Timer(self._read_timeout_s, reader.interrupt)
                timer.start()
                try:
                    reader.execute("BEGIN")
                    yield _Session(reader)
                finally:
                    timer.cancel()
                    timer.join()  # it must not meet a closed connection
        except sqlite3.Error as error:
            raise unavailable(self.name, error) from error

    def close(self) -> None:
        """See `Database`."""
        with self._lock:
            self._close_writer()

    def _check_place(self) -> None:
        """Whether what is open is still what has this name: else rows would go where no one looks.

        Raises:
            LedgerUnavailable: it is not; next time what is there is opened.
        """
        if self._writer is None:
            return
        try:
            found = os.stat(self._path)
            moved = (found.st_dev, found.st_ino) != self._file
        except FileNotFoundError:
            moved = True
        except OSError as error:
            raise unavailable(self.name, error) from error
        if moved:
            self._close_writer()
            raise LedgerUnavailable(f"the ledger {self.name} was moved away or replaced")

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            found = os.fstat(descriptor)
            os.close(descriptor)
        except OSError as error:
            raise unavailable(self.name, error) from error
        self._file = found.st_dev, found.st_ino
        writer = sqlite3.connect(
            self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            writer.execute("PRAGMA journal_mode=WAL")
            writer.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error:
            writer.close()
            raise
        return writer

    def _close_writer(self) -> None:
        """Closes it, which takes back what it has not committed."""
        if self._writer is not None:
            with suppress(sqlite3.Error):  # it is lost anyway
                self._writer.close()
            self._writer = None


class _Session:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `database.Session`."""
        return self._connection.execute(sql, parameters).fetchall()

    def insert(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], then: str
    ) -> list[tuple[Any, ...]]:
        """See `database.Session`."""
        returned = []
        row = f"({', '.join('?' * len(columns))})"
        for start in range(0, len(rows), _INSERT_ROWS):
            part = rows[start : start + _INSERT_ROWS]
            returned += self.execute(
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES "
                f"{', '.join([row] * len(part))} {then}",
                [value for one in part for value in one],
            )
        return returned
