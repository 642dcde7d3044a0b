"""Databases for the tests of the ledger, both kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from jaxserve.metering.ledger.database import Database
from jaxserve.metering.ledger.postgres import Postgres
from jaxserve.metering.ledger.sqlite import Sqlite
from tests.metering.ledger.postgres_server import PostgresServer

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Started, and removed at the end."""
    server = PostgresServer()
    server.start()
    yield server
    server.remove()


def new_schema(server: PostgresServer) -> str:
    """The address of a place without tables in its database."""
    name = f"ledger_{next(_NUMBERS)}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    return f"{server.url}?options=-csearch_path%3D{name}"


@pytest.fixture(params=["sqlite", "postgres"])
def make_database(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[], Database]]:
    """Makes databases without tables, of one kind."""
    made: list[Database] = []

    def make() -> Database:
        if request.param == "sqlite":
            made.append(Sqlite(tmp_path / f"{next(_NUMBERS)}.sqlite"))
        else:
            made.append(Postgres(new_schema(request.getfixturevalue("postgres"))))
        return made[-1]

    yield make
    for database in made:
        database.close()
