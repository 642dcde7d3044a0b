"""The ledger in PostgreSQL, for several servers together, or where backups are looked after.

Several servers may write at the same time: rows are inserted and added to in the order of their
keys, so that no two wait for each other. A commit whose acknowledgement was lost may have been
made: the repeat finds its rows.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError
from jaxserve.metering.ledger.database import Words, unavailable

if TYPE_CHECKING:
    import psycopg

SCHEMES = ("postgresql://", "postgres://")
_CONNECT_S = 5
#: What making tables anew may take.
_PATIENCE_S = 3_600.0
#: Of `pg_advisory_xact_lock`: whoever changes the schema.
SCHEMA_LOCK = 0x6A61_7873


class Postgres:
    """See `database.Database`.

    Args:
        url: postgresql://USER:PASSWORD@HOST:PORT/DATABASE; what libpq takes.
        timeout_s: a transaction that takes longer is given up: by the server, and a little later,
            where that one does not answer at all, here.

    Raises:
        ConfigError: psycopg is missing, or the address cannot be understood.
    """

    words = Words(text='TEXT COLLATE "C"', clustered="")

    def __init__(self, url: str, timeout_s: float = 15.0) -> None:
        try:
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        except ImportError as error:
            raise ConfigError(
                "metering.ledger is in PostgreSQL, which needs the package psycopg: "
                "pip install 'jaxserve[postgres]'"
            ) from error
        self._psycopg = psycopg
        try:
            known = conninfo_to_dict(url)
        except psycopg.Error:  # its message repeats the address, password and all
            raise ConfigError(
                "metering.ledger is no address of PostgreSQL; it takes "
                "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
            ) from None
        self.name = f"PostgreSQL at {known.get('host', 'localhost')}"
        self._url = url
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._writer: psycopg.Connection[Any] | None = None

    @contextmanager
    def writing(self, *, patient: bool = False) -> Iterator[_Session]:
        """See `Database`."""
        timeout_s = _PATIENCE_S if patient else self._timeout_s
        with self._lock:
            try:
                if self._writer is None or self._writer.closed:
                    self._writer = self._connect()
                with _deadline(self._writer, timeout_s), self._writer.transaction():
                    yield _begun(self._writer, timeout_s)
            except self._psycopg.Error as error:
                self._close_writer()
                raise unavailable(self.name, error) from error
            except BaseException:
                self._close_writer()
                raise

    @contextmanager
    def reading(self) -> Iterator[_Session]:
        """See `Database`."""
        try:
            with self._connect() as reader:
                reader.read_only = True
                reader.isolation_level = self._psycopg.IsolationLevel.REPEATABLE_READ
                with _deadline(reader, self._timeout_s), reader.transaction():
                    yield _begun(reader, self._timeout_s)
        except self._psycopg.Error as error:
            raise unavailable(self.name, error) from error

    def close(self) -> None:
        """See `Database`."""
        with self._lock:
            self._close_writer()

    def _connect(self) -> psycopg.Connection[Any]:
        return self._psycopg.connect(
            self._url,
            autocommit=True,
            connect_timeout=_CONNECT_S,
            application_name="jaxserve",
            prepare_threshold=None,  # poolers of connections know no prepared statements
        )

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@contextmanager
def _deadline(connection: psycopg.Connection[Any], timeout_s: float) -> Iterator[None]:
    """Ends a connection whose server is silent for too long; libpq would wait for ever."""
    line = socket.socket(fileno=os.dup(connection.fileno()))

    def cut() -> None:
        with suppress(OSError):  # it has ended already
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(1.5 * timeout_s, cut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        line.close()


def _begun(connection: psycopg.Connection[Any], timeout_s: float) -> _Session:
    """A transaction that has begun: its own settings, since a pooler hands connections on."""
    connection.execute(f"SET LOCAL statement_timeout = {round(1000 * timeout_s)}".encode())
    return _Session(connection)


class _Session:
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `database.Session`."""
        cursor = self._connection.execute(
            sql.replace("%", "%%").replace("?", "%s").encode(), parameters
        )
        return cursor.fetchall() if cursor.description else []

    def insert(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], then: str
    ) -> list[tuple[Any, ...]]:
        """See `database.Session`: a column is one parameter, an array, however many rows."""
        if not rows:
            return []
        kinds = ["text" if isinstance(value, str) else "bigint" for value in rows[0]]
        arrays = ", ".join(f"?::{kind}[]" for kind in kinds)
        return self.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT * FROM unnest({arrays}) {then}",
            [list(column) for column in zip(*rows, strict=True)],
        )


def is_postgres(address: str) -> bool:
    """Whether an address is one of PostgreSQL, not of a file."""
    return address.startswith(SCHEMES)
