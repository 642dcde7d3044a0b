"""What the ledger needs of a database: whole transactions to write in, and reads beside them.

SQL is written once, with `?` for parameters and of the kind that SQLite and PostgreSQL both take;
the few words that differ in a table's definition are in `Words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.errors import LedgerUnavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What definitions of tables call things.

    Attributes:
        text: type of text that is compared byte by byte, so that both sort alike.
        clustered: behind a table that is to be stored in the order of its key.
    """

    text: str
    clustered: str


class Session(Protocol):
    """Statements in one transaction."""

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Runs a statement; returns its rows."""
        ...

    def insert(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], then: str
    ) -> list[tuple[Any, ...]]:
        """Inserts many rows; returns what `then` does.

        Args:
            rows: texts and integers, one of them throughout a column.
            then: what follows the rows: ON CONFLICT …, RETURNING ….
        """
        ...


class Database(Protocol):
    """A place for the tables. Opened when it is first used, and again after a failure.

    Attributes:
        name: for messages; no secrets in it.
        words: see `Words`.
    """

    name: str
    words: Words

    def writing(self, *, patient: bool = False) -> AbstractContextManager[Session]:
        """One transaction at a time: all of it is kept, or nothing.

        Args:
            patient: it may take long: tables are made anew.

        Raises:
            LedgerUnavailable: it cannot be written now. It may have been kept all the same, where
                the connection was lost in the last moment.
        """
        ...

    def reading(self) -> AbstractContextManager[Session]:
        """A view of one moment, from any thread; makes no writer wait.

        Raises:
            LedgerUnavailable: it cannot be read now.
        """
        ...

    def close(self) -> None:
        """Lets go of it."""
        ...


def unavailable(name: str, error: Exception) -> LedgerUnavailable:
    """The error for what a database said, in one line."""
    return LedgerUnavailable(f"the ledger {name} cannot be used: {' '.join(str(error).split())}")
