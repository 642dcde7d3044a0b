"""The ledger: each request is counted once, for good, however often it is told.

Invariants: rows and sums are added in one transaction, and `add` may be repeated at any time, in
any pieces, after any failure, without anything being counted twice; so whoever adds keeps what it
has until `add` returns. Rows of requests are never changed. Every sum is of integers, so that it
does not depend on the order.

Opened when it is first used: a server starts, and serves, while its ledger is away.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

from jaxserve.errors import ConfigError, InvalidRequest, LedgerUnavailable
from jaxserve.metering.entry import ZERO, Entry, Line
from jaxserve.metering.ledger import query as queries
from jaxserve.metering.ledger import rows, schema
from jaxserve.metering.ledger.database import Database, Session
from jaxserve.metering.ledger.postgres import Postgres, is_postgres
from jaxserve.metering.ledger.query import Interval, LineSum, Query, Usage
from jaxserve.metering.ledger.sqlite import Sqlite

FILE = "ledger.sqlite"
#: Requests, and lines, added in one transaction: none takes long, after however long an outage.
_ADD_ROWS = 2_000
#: Rows deleted in one transaction.
_FORGET_ROWS = 5_000


class Ledger:
    """See the module. All of it may be called from any thread.

    Args:
        currency: of all amounts; a ledger has one for good.
        migrations: of the schema; others than `schema.MIGRATIONS` for tests.

    Attributes:
        num_added: requests and lines that were new, since this object was made.
        num_failures: times that it could not be written; up: whether it could the last time.
    """

    def __init__(
        self,
        database: Database,
        currency: str = "usd",
        migrations: Sequence[schema.Migration] = schema.MIGRATIONS,
    ) -> None:
        self.num_added = 0
        self.num_failures = 0
        self.up = True
        self._database = database
        self._currency = currency.lower()
        self._migrations = migrations
        self._prepared = False
        self._preparing = threading.Lock()

    @property
    def name(self) -> str:
        """Where it is; no secrets."""
        return self._database.name

    def add(self, entries: Iterable[Entry], lines: Iterable[Line] = ()) -> int:
        """Adds what it does not have yet.

        Args:
            entries: of requests; each must be the same whenever it comes again.
            lines: likewise. Numbers of a source that begin at 1 and leave none out take no room.

        Returns:
            How many were new.

        Raises:
            LedgerUnavailable: it cannot be written now. Nothing of this was kept, or some of it:
                adding it again is right either way.
        """
        requests = {row[0]: row for row in map(rows.request_row, entries)}
        line_rows = {row[:2]: row for row in map(rows.line_row, lines)}
        before = self.num_added
        while requests or line_rows:
            some = _take(requests, _ADD_ROWS)
            some_lines = _take(line_rows, _ADD_ROWS)
            with self._writing() as session:
                num_added = _add_requests(session, some) + _add_lines(session, some_lines)
            self.num_added += num_added
        return self.num_added - before

    def usage(self, query: Query) -> list[Usage]:
        """What requests came to, by bucket and labels, in their order.

        Raises:
            InvalidRequest: it asks for hours or users of a time that only days are left of.
            LedgerUnavailable: it cannot be read now.
        """
        sql, parameters = queries.usage_sql(query)
        with self._reading() as session:
            if query.needs_hours:
                _check_kept(session, query)
            return [queries.read_usage(query, row) for row in session.execute(sql, parameters)]

    def lines(self, query: Query) -> list[LineSum]:
        """What hardware and energy cost, and how much of it was busy and idle, by bucket and kind.

        Raises:
            LedgerUnavailable: it cannot be read now.
        """
        sql, parameters = queries.lines_sql(query)
        with self._reading() as session:
            return [queries.read_line(query, row) for row in session.execute(sql, parameters)]

    def month_totals(self, month: str) -> dict[str, Decimal]:
        """What each tenant was charged in a month, "2026-11" for one.

        Raises:
            LedgerUnavailable: it cannot be read now.
        """
        found = self._month(month, ("tenant",))
        return {usage.labels["tenant"]: usage.cost for usage in found}

    def month_key_totals(self, month: str) -> dict[tuple[str, str], Decimal]:
        """The same by tenant and key."""
        totals: defaultdict[tuple[str, str], Decimal] = defaultdict(lambda: ZERO)
        for usage in self._month(month, ("tenant", "key_name")):
            totals[usage.labels["tenant"], usage.labels["key_name"]] += usage.cost
        return dict(totals)

    def forget(self, before_hour: int) -> int:
        """Deletes of what is older the oldest day: rows of requests, and sums by hour, with users.

        Sums by day, without users, and lines of hours stay for ever. One day at a time, so that a
        clock that is wrong for an hour cannot empty the ledger. A file keeps its size, and its room
        is used again.

        Returns:
            How many rows it deleted.

        Raises:
            LedgerUnavailable: it cannot be written now; what was deleted is.
        """
        day = queries.DAY_HOURS
        with self._writing() as session:
            ((oldest,),) = session.execute("SELECT MIN(hour) FROM usage_hours")
            if oldest is None:
                return 0
            before_hour = min(before_hour // day, oldest // day + 1) * day
            if before_hour <= oldest:
                return 0
            kept_from = int(schema.state(session, schema.KEPT_FROM) or 0)
            if before_hour > kept_from:
                schema.set_state(session, schema.KEPT_FROM, str(before_hour))
        num_deleted = self._delete("requests", ("request_id",), before_hour)
        num_deleted += self._delete("line_sources", ("source",), before_hour)
        return num_deleted + self._delete("usage_hours", schema.HOUR_KEY, before_hour)

    def _delete(self, table: str, key: Sequence[str], before_hour: int) -> int:
        """Deletes rows of earlier hours, in pieces, so that no `add` waits long."""
        names = ", ".join(key)
        some = f"SELECT {names} FROM {table} WHERE hour < ? LIMIT {_FORGET_ROWS}"
        sql = f"DELETE FROM {table} WHERE ({names}) IN ({some}) RETURNING 1"
        num_deleted = count = 0
        while not num_deleted or count == _FORGET_ROWS:
            with self._writing() as session:
                count = len(session.execute(sql, [before_hour]))
            num_deleted += count
            if not count:
                break
        return num_deleted

    def close(self) -> None:
        """Lets go of the database; another call opens it again."""
        self._prepared = False
        self._database.close()

    def _month(self, month: str, group_by: tuple[str, ...]) -> list[Usage]:
        start, end = queries.month_hours(queries.month_number(month))
        return self.usage(
            Query(
                start_hour=start,
                end_hour=end,
                interval=Interval.ALL,
                group_by=group_by,
                limit=2**31 - 1,
            )
        )

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        try:
            self._prepare()
            with self._database.writing() as session:
                yield session
            self.up = True
        except LedgerUnavailable:
            self._prepared = False  # somebody may put another file there
            self.num_failures += 1
            self.up = False
            raise

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        unprepared: LedgerUnavailable | None = None
        try:
            self._prepare()
        except LedgerUnavailable as error:  # it may be whole, and only not to be written
            unprepared = error
        with self._database.reading() as session:
            if unprepared is not None and not self._is_current(session):
                raise unprepared
            yield session

    def _is_current(self, session: Session) -> bool:
        try:
            schema.check(session, self._currency, len(self._migrations))
        except LedgerUnavailable:
            return False
        return True

    def _prepare(self) -> None:
        """Looks at the tables, the first time that it can."""
        with self._preparing:
            if self._prepared:
                return
            try:
                with self._database.reading() as session:
                    self._prepared = self._is_current(session)
            except LedgerUnavailable:  # there are no tables, or nothing at all: writing will tell
                self._prepared = False
            if self._prepared:
                return
            with self._database.writing(patient=True) as session:
                schema.prepare(session, self._database.words, self._currency, self._migrations)
            self._prepared = True


def database_at(address: str, state: Path) -> Database:
    """The database of `metering.ledger`.

    Args:
        address: a file, postgresql://…, or empty: a file in `state`.

    Raises:
        ConfigError: it cannot be used, whatever happens.
    """
    if is_postgres(address):
        return Postgres(address)
    path = Path(address).expanduser() if address else state / FILE
    if path.is_dir():
        raise ConfigError(f"metering.ledger must name a file, and {path} is a directory")
    return Sqlite(path)


def _take[K](rows_by_key: dict[K, rows.Row], count: int) -> dict[K, rows.Row]:
    """Takes the first so many out."""
    keys = list(itertools.islice(rows_by_key, count))
    return {key: rows_by_key.pop(key) for key in keys}


def _add_requests(session: Session, requests: dict[str, rows.Row]) -> int:
    """Inserts those that are not there, and adds them to the sums."""
    found = session.insert(
        "requests",
        rows.REQUEST,
        sorted(requests.values()),
        "ON CONFLICT (request_id) DO NOTHING RETURNING request_id",
    )
    added = [requests[request_id] for (request_id,) in found]
    schema.add_usage(session, added)
    return len(added)


def _add_lines(session: Session, lines: dict[rows.Row, rows.Row]) -> int:
    """Adds to the hours what was not counted yet.

    Of a source all numbers up to `through` are counted, and those that `lines` has.
    """
    by_source: defaultdict[str, list[rows.Row]] = defaultdict(list)
    for row in lines.values():
        by_source[row[0]].append(row)
    added = []
    for source, of_source in sorted(by_source.items()):
        ((through,),) = session.execute(
            "INSERT INTO line_sources (source, through, hour) VALUES (?, 0, ?)"
            " ON CONFLICT (source) DO UPDATE SET hour = excluded.hour RETURNING through",
            [source, max(row[2] for row in of_source)],
        )
        new = sorted(row for row in of_source if not 0 < row[1] <= through)
        numbers = set(
            session.insert(
                "lines",
                ("source", "number"),
                [row[:2] for row in new],
                "ON CONFLICT (source, number) DO NOTHING RETURNING number",
            )
        )
        added += [row for row in new if (row[1],) in numbers]
        _close_ranks(session, source, through)
    schema.add_sums(
        session, "line_hours", schema.LINE_KEY, rows.LINE_MEASURES, rows.line_sums(added)
    )
    return len(added)


def _close_ranks(session: Session, source: str, through: int) -> None:
    """Moves `through` over the numbers that follow without a gap; their rows are dropped."""
    reached = through
    for (number,) in session.execute(
        "SELECT number FROM lines WHERE source = ? AND number > ? ORDER BY number",
        [source, through],
    ):
        if number != reached + 1:
            break
        reached = number
    if reached > through:
        session.execute("UPDATE line_sources SET through = ? WHERE source = ?", [reached, source])
        session.execute(
            "DELETE FROM lines WHERE source = ? AND number > 0 AND number <= ?", [source, reached]
        )


def _check_kept(session: Session, query: Query) -> None:
    kept_from = int(schema.state(session, schema.KEPT_FROM) or 0)
    if query.start_hour < kept_from:
        raise InvalidRequest(
            "hours and users are kept for metering.keep_days only, here from "
            f"{kept_from * rows.HOUR_S} (Unix time) on: ask for whole days and no users, or for a "
            "later time",
            param="from",
        )
