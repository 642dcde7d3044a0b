"""The ledger's tables, and how an older ledger becomes today's: versioned, forwards only.

    requests     a row for each request, never changed         line_hours  hours' lines, added up
    usage_hours  requests added up by hour and dimensions      line_sources, lines: which of them
    usage_days   … by day, without users: never forgotten                  were counted

A version is never edited once it is released; a new one is added behind it. All that are missing
are made in one transaction, so that a ledger has one version or the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxserve.errors import LedgerUnavailable
from jaxserve.metering.ledger import rows
from jaxserve.metering.ledger.database import Session, Words
from jaxserve.metering.ledger.postgres import SCHEMA_LOCK

#: Makes one version out of the one before.
Migration = Callable[[Session, Words], None]

_VERSION = "schema"
_CURRENCY = "currency"
#: `ledger_state`: the first hour that is wholly there; see `Ledger.forget`.
KEPT_FROM = "kept_from_hour"


def prepare(session: Session, words: Words, currency: str, migrations: Sequence[Migration]) -> None:
    """Brings the tables up to date.

    Raises:
        LedgerUnavailable: a newer jaxserve made them, or they are kept in another currency.
    """
    if words.clustered == "":  # PostgreSQL, where several servers may start at once
        session.execute("SELECT pg_advisory_xact_lock(?)", [SCHEMA_LOCK])
    session.execute(
        f"CREATE TABLE IF NOT EXISTS ledger_state"
        f" (name {words.text} PRIMARY KEY, value {words.text} NOT NULL)"
    )
    version = int(state(session, _VERSION) or 0)
    for migrate in migrations[version:]:
        migrate(session, words)
    if version < len(migrations):
        set_state(session, _VERSION, str(len(migrations)))
    if state(session, _CURRENCY) is None:
        set_state(session, _CURRENCY, currency)
    check(session, currency, len(migrations))


def check(session: Session, currency: str, version: int) -> None:
    """Whether the tables are of this version and currency.

    Raises:
        LedgerUnavailable: they are not.
    """
    found = int(state(session, _VERSION) or 0)
    if found != version:
        raise LedgerUnavailable(
            f"the ledger has schema version {found}, and this jaxserve is for {version}: use the "
            "jaxserve that made it, or another ledger"
        )
    kept_in = state(session, _CURRENCY)
    if kept_in != currency:
        raise LedgerUnavailable(
            f"the ledger is kept in {kept_in}, not in {currency}: amounts of the two do not add "
            "up; set the currency back, or choose another ledger with metering.ledger"
        )


def state(session: Session, name: str) -> str | None:
    """A word of `ledger_state`."""
    found = session.execute("SELECT value FROM ledger_state WHERE name = ?", [name])
    return found[0][0] if found else None


def set_state(session: Session, name: str, value: str) -> None:
    """Changes a word of `ledger_state`."""
    session.execute(
        "INSERT INTO ledger_state (name, value) VALUES (?, ?)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        [name, value],
    )


def add_sums(
    session: Session,
    table: str,
    key: Sequence[str],
    measures: Sequence[str],
    sums: dict[rows.Row, list[int]],
) -> None:
    """Adds to a table of sums, in the order of its key."""
    sets = ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in measures)
    session.insert(
        table,
        [*key, *measures],
        [(*place, *values) for place, values in sorted(sums.items())],
        f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {sets}",
    )


HOUR_KEY = ("hour", *rows.DIMENSIONS)
DAY_KEY = ("day", *(name for name in rows.DIMENSIONS if name != "user_name"))
LINE_KEY = ("hour", "kind")


def add_usage(session: Session, requests: Sequence[rows.Row]) -> None:
    """Adds requests to the sums."""
    hours = rows.usage_sums(requests)
    add_sums(session, "usage_hours", HOUR_KEY, rows.MEASURES, hours)
    add_sums(session, "usage_days", DAY_KEY, rows.MEASURES, rows.by_day(hours))


# ---------------------------------------------------------------------------- versions


def _requests_and_lines(session: Session, words: Words) -> None:
    """Version 1: each request once, and hours' lines."""
    texts = {"route", "outcome", *rows.DIMENSIONS}
    columns = ", ".join(
        f"{name} {words.text if name in texts else 'BIGINT'} NOT NULL" for name in rows.REQUEST[1:]
    )
    session.execute(f"CREATE TABLE requests (request_id {words.text} PRIMARY KEY, {columns})")
    session.execute("CREATE INDEX requests_hour ON requests (hour)")  # what `forget` goes by
    session.execute(
        f"CREATE TABLE line_sources (source {words.text} PRIMARY KEY,"
        f" through BIGINT NOT NULL, hour BIGINT NOT NULL) {words.clustered}"
    )
    session.execute(
        f"CREATE TABLE lines (source {words.text}, number BIGINT, PRIMARY KEY (source, number))"
        f" {words.clustered}"
    )
    _sums(session, words, "line_hours", LINE_KEY, rows.LINE_MEASURES)


def _usage(session: Session, words: Words) -> None:
    """Version 2: sums of requests, so that a report need not visit each."""
    _sums(session, words, "usage_hours", HOUR_KEY, rows.MEASURES)
    _sums(session, words, "usage_days", DAY_KEY, rows.MEASURES)
    after = ""
    while True:  # in pieces: there may be more than memory holds
        found = session.execute(
            f"SELECT {', '.join(rows.REQUEST)} FROM requests WHERE request_id > ?"
            " ORDER BY request_id LIMIT 20000",
            [after],
        )
        if not found:
            return
        after = found[-1][0]
        add_usage(session, found)


def _sums(
    session: Session, words: Words, table: str, key: Sequence[str], measures: Sequence[str]
) -> None:
    texts = {"kind", *rows.DIMENSIONS}
    keys = ", ".join(f"{name} {words.text if name in texts else 'BIGINT'}" for name in key)
    counts = ", ".join(f"{name} BIGINT NOT NULL" for name in measures)
    session.execute(
        f"CREATE TABLE {table} ({keys}, {counts}, PRIMARY KEY ({', '.join(key)})) {words.clustered}"
    )


MIGRATIONS: tuple[Migration, ...] = (_requests_and_lines, _usage)
