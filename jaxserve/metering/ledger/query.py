"""What can be asked of the ledger, and the SQL of it.

Whole days that nobody asks the users of are read from `usage_days`: a month has 31 times as many
rows there as there are keys, whatever the number of requests. All else is read by the hour.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from jaxserve.metering.entry import Measures
from jaxserve.metering.ledger import rows
from jaxserve.metering.ledger.rows import DIMENSIONS, HOUR_S, MEASURES

DAY_HOURS = 24
_UTC = datetime.UTC


class Interval(enum.StrEnum):
    """How long a bucket is."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    ALL = "all"  # one bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A question about usage.

    Attributes:
        start_hour, end_hour: since 1970, UTC; the end is not in it.
        group_by: of `rows.DIMENSIONS`, what is told apart.
        only: by dimension, the one value that counts.
        limit, offset: rows of the answer, and how many are left out before them.
    """

    start_hour: int
    end_hour: int
    interval: Interval = Interval.DAY
    group_by: tuple[str, ...] = ()
    only: Mapping[str, str] = field(default_factory=dict)
    limit: int = 10_000
    offset: int = 0

    @property
    def needs_hours(self) -> bool:
        """Whether days alone cannot answer it."""
        return (
            self.interval is Interval.HOUR
            or self.start_hour % DAY_HOURS != 0
            or self.end_hour % DAY_HOURS != 0
            or "user_name" in self.group_by
            or "user_name" in self.only
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Measures):
    """What some requests came to.

    Attributes:
        start_hour, end_hour: of its bucket.
        labels: by dimension asked for.
    """

    start_hour: int
    end_hour: int
    labels: dict[str, str] = field(default_factory=dict)
    num_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LineSum:
    """What one kind of line came to in a bucket."""

    start_hour: int
    end_hour: int
    kind: str
    duration_ns: int
    energy_j: float
    carbon_g: float
    cost: Decimal


def usage_sql(query: Query) -> tuple[str, list[Any]]:
    """The statement of a query, and its parameters."""
    table, time, unit = (
        ("usage_hours", "hour", 1) if query.needs_hours else ("usage_days", "day", DAY_HOURS)
    )
    bucket, joined, parameters = _bucket(query, time, unit)
    group = [bucket, *query.group_by]
    where = [f"{time} >= ?", f"{time} < ?"]
    parameters += [query.start_hour // unit, query.end_hour // unit]
    for name, value in sorted(query.only.items()):
        assert name in DIMENSIONS
        where.append(f"{name} = ?")
        parameters.append(rows.text(value))
    assert set(query.group_by) <= set(DIMENSIONS)
    places = ", ".join(str(place + 1) for place in range(len(group)))
    sql = (
        f"SELECT {', '.join(group)}, {', '.join(f'SUM({name})' for name in MEASURES)}"
        f" FROM {table}{joined} WHERE {' AND '.join(where)} GROUP BY {places} ORDER BY {places}"
        " LIMIT ? OFFSET ?"
    )
    return sql, [*parameters, query.limit, query.offset]


def read_usage(query: Query, row: rows.Row) -> Usage:
    """One row of its answer."""
    start, end = bucket_of(query, int(row[0]))
    labels = dict(zip(query.group_by, row[1:], strict=False))
    first = 1 + len(query.group_by)
    values = dict(zip(MEASURES, map(int, row[first:]), strict=True))
    prefill, decode, wasted = (
        rows.money(values[f"{name}_micro"], values[f"{name}_pico"]) for name in rows.MONEY
    )
    return Usage(
        start_hour=start,
        end_hour=end,
        labels=labels,
        num_requests=values["num_requests"],
        prompt_tokens=values["prompt_tokens"],
        cached_tokens=values["cached_tokens"],
        completion_tokens=values["completion_tokens"],
        prefill_device_ns=values["prefill_device_ns"],
        decode_device_ns=values["decode_device_ns"],
        wasted_device_ns=values["wasted_device_ns"],
        energy_j=values["energy_uj"] / 1e6,
        carbon_g=values["carbon_ug"] / 1e6,
        prefill_cost=prefill,
        decode_cost=decode,
        wasted_cost=wasted,
    )


def lines_sql(query: Query) -> tuple[str, list[Any]]:
    """The statement of a query for hours' lines: all of them, whoever caused them."""
    bucket, joined, parameters = _bucket(query, "hour", 1)
    sums = ", ".join(f"SUM({name})" for name in rows.LINE_MEASURES)
    sql = (
        f"SELECT {bucket}, kind, {sums} FROM line_hours{joined} WHERE hour >= ? AND hour < ?"
        " GROUP BY 1, 2 ORDER BY 1, 2"
    )
    return sql, [*parameters, query.start_hour, query.end_hour]


def read_line(query: Query, row: rows.Row) -> LineSum:
    """One row of its answer."""
    start, end = bucket_of(query, int(row[0]))
    return LineSum(
        start_hour=start,
        end_hour=end,
        kind=row[1],
        duration_ns=int(row[2]),
        energy_j=int(row[3]) / 1e6,
        carbon_g=int(row[4]) / 1e6,
        cost=rows.money(row[5], row[6]),
    )


def bucket_of(query: Query, first: int) -> tuple[int, int]:
    """Hours of a bucket: from its own start to its end, as far as they were asked for."""
    match query.interval:
        case Interval.HOUR:
            start, end = first, first + 1
        case Interval.DAY:
            start, end = first * DAY_HOURS, (first + 1) * DAY_HOURS
        case Interval.MONTH:
            start, end = month_hours(first)
        case Interval.ALL:
            start, end = query.start_hour, query.end_hour
    return max(start, query.start_hour), min(end, query.end_hour)


def month_number(name: str) -> int:
    """Months since 1970 of "2026-11".

    Raises:
        ValueError: it is no month.
    """
    date = datetime.datetime.strptime(name, "%Y-%m")
    return (date.year - 1970) * 12 + date.month - 1


def month_at(hour: int) -> int:
    """Months since 1970 of an hour since then."""
    date = datetime.datetime.fromtimestamp(hour * HOUR_S, _UTC)
    return (date.year - 1970) * 12 + date.month - 1


def month_hours(month: int) -> tuple[int, int]:
    """The first hour of a month, and of the next."""
    first, following = (
        datetime.datetime(1970 + number // 12, number % 12 + 1, 1, tzinfo=_UTC)
        for number in (month, month + 1)
    )
    return int(first.timestamp()) // HOUR_S, int(following.timestamp()) // HOUR_S


def _bucket(query: Query, time: str, unit: int) -> tuple[str, str, list[Any]]:
    """The expression of a row's bucket, what must be joined for it, and that one's parameters."""
    match query.interval:
        case Interval.HOUR:
            return time, "", []
        case Interval.DAY:
            return (time if unit == DAY_HOURS else f"{time} / {DAY_HOURS}"), "", []
        case Interval.ALL:
            return "0", "", []
        case Interval.MONTH:
            months = range(month_at(query.start_hour), month_at(query.end_hour - 1) + 1)
            bounds = [(month, *(hour // unit for hour in month_hours(month))) for month in months]
            values = ", ".join(["(?, ?, ?)"] * len(bounds))
            joined = (
                f" JOIN (WITH months (month, since, until) AS (VALUES {values})"
                f" SELECT month, since, until FROM months) AS months"
                f" ON {time} >= months.since AND {time} < months.until"
            )
            return "months.month", joined, [value for bound in bounds for value in bound]
