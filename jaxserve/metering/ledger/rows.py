"""Entries and lines as rows of integers, which add up the same in any order.

Money is kept as integers of 1e-12 of the currency. A sum of it is kept as two, of 1e-6 and of
1e-12, each added up by itself: 64 bits then hold 9e12 of any currency, and no database needs
decimals. Energy is in microjoules, carbon in micrograms.

What comes must never make the ledger refuse it for good, since it would come again and again: text
is cut where it is too long for an index, and a number that is none counts as 0, and is told.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any

from jaxserve.metering.entry import Entry, Line

logger = logging.getLogger(__name__)

HOUR_S = 3600
#: Bytes of a text in a row: six of them fit PostgreSQL's largest index row.
MAX_TEXT_BYTES = 255
#: Integers of a column are below it; counts further, so that a thousand wrong ones still add up.
_BOUND, _COUNT_BOUND = 2**63, 2**53
_PICO = Decimal("1e-12")
#: Enough digits for the largest integer and what is rounded off it.
_EXACT = Context(prec=60)
_MICRO = 1_000_000

#: By which usage is told apart, in the order of the tables' keys.
DIMENSIONS = ("tenant", "key_name", "user_name", "model", "adapter")
COUNTS = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "prefill_device_ns",
    "decode_device_ns",
    "wasted_device_ns",
    "energy_uj",
    "carbon_ug",
)
MONEY = ("prefill_cost", "decode_cost", "wasted_cost")
#: Columns of a request's row.
REQUEST = ("request_id", "ended_us", "hour", "route", "outcome", *DIMENSIONS, *COUNTS, *MONEY)
#: Columns of a sum of requests.
MEASURES = (
    "num_requests",
    *COUNTS,
    *(f"{name}_{unit}" for name in MONEY for unit in ("micro", "pico")),
)
LINE = ("source", "number", "hour", "kind", "duration_ns", "energy_uj", "carbon_ug", "cost")
LINE_MEASURES = ("duration_ns", "energy_uj", "carbon_ug", "cost_micro", "cost_pico")

Row = tuple[Any, ...]


def request_row(entry: Entry) -> Row:
    """A request as `REQUEST` has it."""
    about = f"request {entry.request_id}"
    ended_us = _integer(entry.ended_s * 1e6, about)
    return (
        text(entry.request_id),
        ended_us,
        ended_us // (HOUR_S * _MICRO),
        text(entry.route),
        text(entry.outcome),
        *map(text, (entry.tenant, entry.key, entry.user, entry.model, entry.adapter)),
        _integer(entry.prompt_tokens, about),
        _integer(entry.cached_tokens, about),
        _integer(entry.completion_tokens, about),
        _integer(entry.prefill_device_ns, about),
        _integer(entry.decode_device_ns, about),
        _integer(entry.wasted_device_ns, about),
        _integer(entry.energy_j * 1e6, about),
        _integer(entry.carbon_g * 1e6, about),
        _pico(entry.prefill_cost, about),
        _pico(entry.decode_cost, about),
        _pico(entry.wasted_cost, about),
    )


def line_row(line: Line) -> Row:
    """A line as `LINE` has it."""
    about = f"line {line.number} of {line.source}"
    return (
        text(line.source),
        line.number,
        line.hour,
        text(line.kind),
        _integer(line.duration_ns, about),
        _integer(line.energy_j * 1e6, about),
        _integer(line.carbon_g * 1e6, about),
        _pico(line.cost, about),
    )


def usage_sums(rows: Iterable[Row]) -> dict[Row, list[int]]:
    """Requests' rows added up: `MEASURES` by hour and dimensions."""
    first = REQUEST.index(DIMENSIONS[0])
    counts = first + len(DIMENSIONS)
    money = counts + len(COUNTS)
    sums: dict[Row, list[int]] = {}
    for row in rows:
        values = [1, *row[counts:money]]
        for amount in row[money:]:
            values += divmod(amount, _MICRO)
        _add(sums, (row[2], *row[first:counts]), values)
    return sums


def by_day(sums: Mapping[Row, list[int]]) -> dict[Row, list[int]]:
    """Sums by hour as sums by day, without users."""
    user = 1 + DIMENSIONS.index("user_name")
    days: dict[Row, list[int]] = {}
    for key, values in sums.items():
        _add(days, (key[0] // 24, *key[1:user], *key[user + 1 :]), values)
    return days


def line_sums(rows: Iterable[Row]) -> dict[Row, list[int]]:
    """Lines' rows added up: `LINE_MEASURES` by hour and kind."""
    sums: dict[Row, list[int]] = {}
    for row in rows:
        _add(sums, (row[2], row[3]), [*row[4:7], *divmod(row[7], _MICRO)])
    return sums


def money(micro: int, pico: int) -> Decimal:
    """An amount of the currency."""
    return _EXACT.scaleb(Decimal(int(micro) * _MICRO + int(pico)), -12)


def text(value: str) -> str:
    """Text that every database takes in an index: what is too long keeps a hash of the rest."""
    if len(value) * 4 <= MAX_TEXT_BYTES and value.isascii() and "\0" not in value:
        return str(value)
    clean = value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    encoded = clean.encode()
    if len(encoded) <= MAX_TEXT_BYTES:
        return clean
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    kept = encoded[: MAX_TEXT_BYTES - len(digest) - 3].decode("utf-8", "ignore")
    return f"{kept}…{digest}"


def _add(sums: dict[Row, list[int]], key: Row, values: list[int]) -> None:
    known = sums.get(key)
    sums[key] = values if known is None else [a + b for a, b in zip(known, values, strict=True)]


def _integer(value: float, about: str) -> int:
    if math.isfinite(value) and abs(value) < _COUNT_BOUND:
        return round(value)
    logger.error("the ledger counts %s as 0, of %s", value, about)
    return 0


def _pico(amount: Decimal, about: str) -> int:
    try:
        units = int(_EXACT.scaleb(amount.quantize(_PICO, ROUND_HALF_EVEN, _EXACT), 12))
    except (InvalidOperation, ValueError, OverflowError):  # no number, or one beyond all measure
        units = _BOUND
    if abs(units) < _BOUND:
        return units
    logger.error("the ledger counts a cost of %s as 0, of %s", amount, about)
    return 0
