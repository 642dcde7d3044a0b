"""What /v1/usage and /v1/costs answer: a client's question read, and the ledger's answer written.

Buckets with results, as OpenAI's usage and costs have them, or CSV. A tenant sees itself only; an
admin sees all, what was wasted, and the hours' lines (`group_by=line_item`).
"""

from __future__ import annotations

import csv
import datetime
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import groupby
from typing import Any

import msgspec

from jaxserve.errors import Forbidden, InvalidRequest
from jaxserve.metering.entry import ZERO, LineKind
from jaxserve.metering.ledger.book import Ledger
from jaxserve.metering.ledger.query import DAY_HOURS, Interval, LineSum, Query, Usage
from jaxserve.metering.ledger.rows import HOUR_S

JSON, CSV = "application/json", "text/csv; charset=utf-8"

#: How a client calls the ledger's dimensions.
LABELS = {
    "tenant": "tenant",
    "key": "key_name",
    "user": "user_name",
    "model": "model",
    "adapter": "adapter",
}
LINE_ITEM = "line_item"
MAX_RESULTS, DEFAULT_RESULTS = 10_000, 1_000
_DEFAULT_DAYS = 30
#: Beyond tomorrow nothing is looked for, but what a wrong clock may have written.
_AHEAD_HOURS = 366 * DAY_HOURS
#: OpenAI's words for some of the parameters.
_ALIASES = {"start_time": "from", "end_time": "to", "bucket_width": "interval"}
_INTERVALS = {"1h": Interval.HOUR, "1d": Interval.DAY} | {kind.value: kind for kind in Interval}
_PARAMETERS = ("from", "to", "interval", "group_by", "limit", "page", "format", *LABELS)
#: A client chooses some of the texts; a spreadsheet would take these for the start of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_ENCODER = msgspec.json.Encoder(decimal_format="number")

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question, understood.

    Attributes:
        by_line: hours' lines are asked for, not requests.
        admin: whether it may see what concerns all.
    """

    query: Query
    by_line: bool
    as_csv: bool
    admin: bool


def usage_report(
    ledger: Ledger, parameters: Mapping[str, str], tenant: str, admin: bool, now_s: float
) -> tuple[str, bytes]:
    """Answers /v1/usage: content type and body.

    Args:
        parameters: of the URL.
        tenant, admin: who asks.
        now_s: wall clock.

    Raises:
        InvalidRequest: a parameter is wrong, which it names.
        Forbidden: it is another tenant's.
        LedgerUnavailable: the ledger cannot be read now.
    """
    asked = read_question(parameters, tenant, admin, now_s)
    if asked.by_line:
        raise InvalidRequest("only /v1/costs has line items", param="group_by")
    return _answer(asked, ledger.usage(_one_more(asked.query)), _usage_result)


def costs_report(
    ledger: Ledger,
    currency: str,
    parameters: Mapping[str, str],
    tenant: str,
    admin: bool,
    now_s: float,
) -> tuple[str, bytes]:
    """Answers /v1/costs; see `usage_report`."""
    asked = read_question(parameters, tenant, admin, now_s)
    if asked.by_line:
        items = _line_items(ledger, asked.query)
        page = items[asked.query.offset : asked.query.offset + asked.query.limit + 1]
        return _answer(asked, page, lambda item: _line_result(item, currency))
    return _answer(
        asked,
        ledger.usage(_one_more(asked.query)),
        lambda usage: _cost_result(usage, currency, asked.admin),
    )


def read_question(parameters: Mapping[str, str], tenant: str, admin: bool, now_s: float) -> Asked:
    """Reads the parameters of a URL.

    Raises:
        InvalidRequest, Forbidden: see `usage_report`.
    """
    words: dict[str, str] = {}
    for given, value in parameters.items():
        name = _ALIASES.get(given, given)
        if name not in _PARAMETERS:
            known = ", ".join(_PARAMETERS)
            raise InvalidRequest(f"{given!r} is no parameter; there are {known}", param=given)
        if name in words:
            raise InvalidRequest(f"{given!r} says the same as another parameter", param=given)
        words[name] = value
    interval = _word(words, "interval", _INTERVALS, "day")
    grouped = [name for name in words.get("group_by", "").split(",") if name]
    for name in grouped:
        if name not in LABELS and name != LINE_ITEM:
            known = ", ".join([*LABELS, LINE_ITEM])
            raise InvalidRequest(f"group_by takes {known}, not {name!r}", param="group_by")
    only = {LABELS[name]: words[name] for name in LABELS if name in words}
    by_line = LINE_ITEM in grouped
    if by_line:
        _check_lines(grouped, only, admin)
    if not admin and only.setdefault("tenant", tenant) != tenant:
        raise Forbidden("another tenant's usage needs a key of the admin role", param="tenant")
    start, end = _hours(words, interval, now_s)
    query = Query(
        start_hour=start,
        end_hour=end,
        interval=interval,
        group_by=tuple(LABELS[name] for name in LABELS if name in grouped),
        only=only,
        limit=_number(words, "limit", DEFAULT_RESULTS, 1, MAX_RESULTS),
        offset=_number(words, "page", 0, 0, 2**31),
    )
    as_csv = _word(words, "format", {"json": False, "csv": True}, "json")
    return Asked(query=query, by_line=by_line, as_csv=as_csv, admin=admin)


# ---------------------------------------------------------------------------- parameters


def _word[T](words: Mapping[str, str], name: str, known: Mapping[str, T], default: str) -> T:
    value = words.get(name, default)
    if value not in known:
        raise InvalidRequest(f"{name} takes {', '.join(known)}, not {value!r}", param=name)
    return known[value]


def _number(words: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    value = words.get(name, str(default))
    short = value.isascii() and value.isdigit() and len(value) <= 20
    if not (short and low <= int(value) <= high):
        raise InvalidRequest(f"{name} takes {low} to {high}, not {value!r}", param=name)
    return int(value)


def _hours(words: Mapping[str, str], interval: Interval, now_s: float) -> tuple[int, int]:
    """From when, and until when: whole hours, rounded outwards; days where nothing is said."""
    tomorrow = (int(now_s) // HOUR_S // DAY_HOURS + 1) * DAY_HOURS
    start, end = _time(words, "from"), _time(words, "to")
    end_hour = tomorrow if end is None else min(-(-end // HOUR_S), tomorrow + _AHEAD_HOURS)
    default = end_hour - _DEFAULT_DAYS * DAY_HOURS
    start_hour = max(0, default if start is None else start // HOUR_S)
    if start_hour >= end_hour:
        raise InvalidRequest("from must be before to, and not in the future", param="from")
    return start_hour, end_hour


def _time(words: Mapping[str, str], name: str) -> int | None:
    """Seconds since 1970."""
    value = words.get(name)
    if value is None:
        return None
    if value.isascii() and value.isdigit() and len(value) < 12:
        return int(value)
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError:
        raise InvalidRequest(
            f"{name} takes Unix seconds, or a date or time like 2026-11-01 or "
            f"2026-11-01T12:00Z, not {value!r}",
            param=name,
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp())


def _check_lines(grouped: Sequence[str], only: Mapping[str, str], admin: bool) -> None:
    if not admin:
        raise Forbidden("line items need a key of the admin role", param="group_by")
    if len(grouped) > 1 or only:
        raise InvalidRequest(
            "line items are of all requests together: group by them alone, and name no tenant, "
            "key, user, model or adapter",
            param="group_by",
        )


def _one_more(query: Query) -> Query:
    """So that it is seen whether there is more."""
    return replace(query, limit=query.limit + 1)


# ---------------------------------------------------------------------------- answers


def _usage_result(usage: Usage) -> Result:
    return {
        "object": "usage.result",
        "num_model_requests": usage.num_requests,
        "input_tokens": usage.prompt_tokens,
        "input_cached_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "device_s": (usage.prefill_device_ns + usage.decode_device_ns) / 1e9,
        "energy_j": usage.energy_j,
        "carbon_g": usage.carbon_g,
        **_labels(usage),
    }


def _cost_result(usage: Usage, currency: str, admin: bool) -> Result:
    wasted = {"wasted": _plain(usage.wasted_cost)} if admin else {}
    return {
        "object": "costs.result",
        "amount": {"value": _plain(usage.cost), "currency": currency},
        "prefill": _plain(usage.prefill_cost),
        "decode": _plain(usage.decode_cost),
        **wasted,
        "num_model_requests": usage.num_requests,
        LINE_ITEM: None,
        **_labels(usage),
    }


def _line_result(line: LineSum, currency: str) -> Result:
    return {
        "object": "costs.result",
        "amount": {"value": _plain(line.cost), "currency": currency},
        "duration_s": line.duration_ns / 1e9,
        "energy_j": line.energy_j,
        "carbon_g": line.carbon_g,
        LINE_ITEM: line.kind,
    }


def _labels(usage: Usage) -> dict[str, str | None]:
    return {name: usage.labels.get(column) for name, column in LABELS.items()}


def _line_items(ledger: Ledger, query: Query) -> list[LineSum]:
    """The hours' lines, and beside them what requests were charged, and the rest: waste.

    charged + waste + idle = hardware + energy. A request that ran into another hour is charged
    where it ended, so that for single hours waste may even be negative.
    """
    by_bucket: defaultdict[tuple[int, int], dict[str, LineSum]] = defaultdict(dict)
    for line in ledger.lines(query):
        by_bucket[line.start_hour, line.end_hour][line.kind] = line
    everything = replace(query, limit=2**31 - 1, offset=0)
    for usage in ledger.usage(everything):
        bucket = usage.start_hour, usage.end_hour
        by_bucket[bucket]["charged"] = LineSum(
            start_hour=usage.start_hour,
            end_hour=usage.end_hour,
            kind="charged",
            duration_ns=usage.prefill_device_ns + usage.decode_device_ns,
            energy_j=usage.energy_j,
            carbon_g=usage.carbon_g,
            cost=usage.cost,
        )
    for (start, end), lines in by_bucket.items():
        nothing = LineSum(
            start_hour=start, end_hour=end, kind="", duration_ns=0, energy_j=0.0, carbon_g=0.0,
            cost=ZERO,
        )  # fmt: skip
        busy, charged = lines.get(LineKind.BUSY, nothing), lines.get("charged", nothing)
        lines["waste"] = replace(
            nothing,
            kind="waste",
            duration_ns=busy.duration_ns - charged.duration_ns,
            energy_j=busy.energy_j - charged.energy_j,
            carbon_g=busy.carbon_g - charged.carbon_g,
            cost=busy.cost - charged.cost,
        )
    return [lines[kind] for _, lines in sorted(by_bucket.items()) for kind in sorted(lines)]


def _plain(amount: Decimal) -> Decimal:
    """Without zeros at the end, and without an exponent that would need reading twice."""
    amount = amount.normalize() if amount else ZERO
    return amount.quantize(Decimal(1)) if amount == amount.to_integral_value() else amount


def _answer[T: (Usage, LineSum)](
    asked: Asked, found: Sequence[T], result: Callable[[T], Result]
) -> tuple[str, bytes]:
    query = asked.query
    has_more = len(found) > query.limit
    found = found[: query.limit]
    if asked.as_csv:
        return CSV, _csv(asked, found, result)
    buckets = [
        {
            "object": "bucket",
            "start_time": start * HOUR_S,
            "end_time": end * HOUR_S,
            "results": [result(item) for item in items],
        }
        for (start, end), items in groupby(found, lambda item: (item.start_hour, item.end_hour))
    ]
    document = {
        "object": "page",
        "data": buckets,
        "has_more": has_more,
        "next_page": str(query.offset + query.limit) if has_more else None,
    }
    return JSON, _ENCODER.encode(document)


def _csv[T: (Usage, LineSum)](
    asked: Asked, found: Sequence[T], result: Callable[[T], Result]
) -> bytes:
    """One line for each result; labels that were not asked for are left out."""
    lines = io.StringIO()
    writer = csv.writer(lines)
    header: list[str] = []
    for item in found:
        cells = {"start": _iso(item.start_hour), "end": _iso(item.end_hour)}
        of_item = result(item)
        for name, value in of_item.items():
            if name == "amount":
                cells |= {"amount": format(value["value"], "f"), "currency": value["currency"]}
            elif isinstance(value, Decimal):
                cells[name] = format(value, "f")
            elif name != "object" and value is not None:
                cells[name] = _cell(value)
        if not header:
            header = list(cells)
            writer.writerow(header)
        writer.writerow(cells.values())
    return lines.getvalue().encode()


def _cell(value: str | float) -> str:
    shown = str(value)
    return f"'{shown}" if isinstance(value, str) and shown.startswith(_FORMULA) else shown


def _iso(hour: int) -> str:
    moment = datetime.datetime.fromtimestamp(hour * HOUR_S, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%MZ")
