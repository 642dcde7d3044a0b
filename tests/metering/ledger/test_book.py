"""The ledger counts once what it is told any number of times, and gives exact sums."""

from __future__ import annotations

import math
import random
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError, InvalidRequest, LedgerUnavailable
from jaxserve.metering.entry import Entry, LineKind
from jaxserve.metering.ledger import rows, schema
from jaxserve.metering.ledger.book import FILE, Ledger, database_at
from jaxserve.metering.ledger.database import Database
from jaxserve.metering.ledger.postgres import Postgres
from jaxserve.metering.ledger.query import Interval, Query
from jaxserve.metering.ledger.sqlite import Sqlite
from tests.metering.ledger.conftest import new_schema
from tests.metering.ledger.entries import (
    NOVEMBER_HOUR,
    NOVEMBER_S,
    charged,
    entry,
    line,
    month_of_entries,
)
from tests.metering.ledger.postgres_server import PostgresServer

Make = Callable[[], Database]
NOVEMBER = (NOVEMBER_HOUR, NOVEMBER_HOUR + 30 * 24)


def asked(**values) -> Query:
    """A question about November."""
    return Query(**({"start_hour": NOVEMBER[0], "end_hour": NOVEMBER[1]} | values))


def everything(ledger: Ledger) -> tuple:
    """All that a ledger says, in every way that it says it."""
    queries = [
        asked(interval=interval, group_by=group_by)
        for interval in Interval
        for group_by in ((), ("tenant",), rows.DIMENSIONS, ("model", "adapter"))
    ]
    return (
        [ledger.usage(query) for query in queries],
        [ledger.lines(query) for query in queries],
        ledger.month_totals("2026-11"),
        ledger.month_key_totals("2026-11"),
    )


def test_a_request_is_counted_whole(make_database: Make):
    ledger = Ledger(make_database())
    assert ledger.add([entry(1, user="u", adapter="law")], [line(1)]) == 2
    (usage,) = ledger.usage(asked(group_by=rows.DIMENSIONS))
    assert usage.labels == {
        "tenant": "acme",
        "key_name": "acme-key",
        "user_name": "u",
        "model": "smollm2",
        "adapter": "law",
    }
    assert (usage.start_hour, usage.end_hour) == (NOVEMBER_HOUR, NOVEMBER_HOUR + 24)
    assert (usage.num_requests, usage.prompt_tokens, usage.cached_tokens) == (1, 11, 4)
    assert (usage.completion_tokens, usage.energy_j, usage.carbon_g) == (20, 0.125, 0.000_004)
    assert (usage.prefill_device_ns, usage.decode_device_ns) == (1_001, 2_000)
    assert (usage.wasted_device_ns, usage.wasted_cost) == (30, Decimal("0.000000000001"))
    assert usage.prefill_cost == Decimal("0.000001234568")
    assert usage.cost == Decimal("0.000004564568")
    (of_hour,) = ledger.lines(asked(interval=Interval.HOUR))
    assert (of_hour.start_hour, of_hour.kind) == (NOVEMBER_HOUR, "busy")
    assert (of_hour.duration_ns, of_hour.cost) == (5, Decimal("0.25"))


def test_month_totals_are_those_of_a_recount(make_database: Make):
    ledger = Ledger(make_database())
    entries = month_of_entries(3_000)
    strangers = [
        entry(10_001, ended_s=NOVEMBER_S - 0.001),  # October's last millisecond
        entry(10_002, ended_s=NOVEMBER_S + 30 * 86_400),  # December's first moment
    ]
    ledger.add([*entries, *strangers])
    assert ledger.month_totals("2026-11") == charged(entries)
    assert ledger.month_totals("2026-10") == charged(strangers[:1])
    assert ledger.month_totals("2026-12") == charged(strangers[1:])
    assert ledger.month_totals("2025-11") == {}
    of_keys = {(name, f"{name}-key"): total for name, total in charged(entries).items()}
    assert ledger.month_key_totals("2026-11") == of_keys


def test_all_ways_to_ask_agree(make_database: Make):
    ledger = Ledger(make_database())
    entries = month_of_entries(2_000)
    ledger.add(entries)
    whole = charged(entries)
    for interval in Interval:
        for group_by in (("tenant",), ("tenant", "user_name"), rows.DIMENSIONS):
            found = ledger.usage(asked(interval=interval, group_by=group_by, limit=100_000))
            totals = dict.fromkeys(whole, Decimal(0))
            for usage in found:
                totals[usage.labels["tenant"]] += usage.cost
                assert NOVEMBER[0] <= usage.start_hour < usage.end_hour <= NOVEMBER[1]
            assert totals == whole, (interval, group_by)
    for name in whole:
        (usage,) = ledger.usage(asked(interval=Interval.ALL, only={"tenant": name}))
        assert usage.cost == whole[name]
    # Parts of a day are read by the hour.
    cut = Query(start_hour=NOVEMBER[0] + 5, end_hour=NOVEMBER[0] + 31, interval=Interval.DAY)
    inside = [item for item in entries if 5 <= (item.ended_s - NOVEMBER_S) / 3600 < 31]
    found = ledger.usage(cut)
    assert sum(usage.num_requests for usage in found) == len(inside) > 10
    assert [usage.start_hour - NOVEMBER[0] for usage in found] == [5, 24]


def test_pages_of_an_answer_follow_each_other(make_database: Make):
    ledger = Ledger(make_database())
    ledger.add(month_of_entries(300))
    whole = ledger.usage(asked(group_by=("tenant", "model")))
    pages = [
        usage
        for offset in range(0, len(whole), 7)
        for usage in ledger.usage(asked(group_by=("tenant", "model"), limit=7, offset=offset))
    ]
    assert pages == whole and len(whole) > 30


def test_both_databases_say_the_same(tmp_path: Path, postgres: PostgresServer):
    entries = month_of_entries(2_000)
    entries += [
        entry(9_000 + place, user=user, tenant=user[:3], model=user)
        for place, user in enumerate(["", "Ä", "z", "Z", "a b", "ß", "\0", "\ud800", "x" * 5_000])
    ]
    lines = [
        line(number, kind=kind, hour=NOVEMBER_HOUR + number % 50, energy_j=number / 3)
        for number in range(1, 200)
        for kind in [list(LineKind)[number % 4]]
    ]
    answers = []
    for database in (Sqlite(tmp_path / "ledger"), Postgres(new_schema(postgres))):
        ledger = Ledger(database)
        ledger.add(entries, lines)
        answers.append(everything(ledger))
        ledger.close()
    assert answers[0] == answers[1]
    assert len(answers[0][1][0]) > 40


_STORY = month_of_entries(30, seed=3)
_LINES = [line(n, source=f"life{n % 2}", hour=NOVEMBER_HOUR + n % 3) for n in range(-1, 20)]
_ONCE: list[tuple] = []  # what a ledger says that was told all of it once

#: Batches of entries and lines by their places, and the order of what follows.
stories = given(
    batches=st.lists(
        st.tuples(
            st.lists(st.integers(0, len(_STORY) - 1), max_size=12),
            st.lists(st.integers(0, len(_LINES) - 1), max_size=12),
        ),
        max_size=8,
    ),
    seed=st.integers(0, 1000),
)


def check_story(database: Database, batches: list[tuple[list[int], list[int]]], seed: int) -> None:
    """However it is told, the ledger then says what it says of everything told once."""
    if not _ONCE:
        with tempfile.TemporaryDirectory() as folder:
            plain = Ledger(Sqlite(Path(folder) / FILE))
            assert plain.add(_STORY, _LINES) == len(_STORY) + len(_LINES)
            _ONCE.append(everything(plain))
            plain.close()
    ledger = Ledger(database)
    for of_entries, of_lines in batches:
        ledger.add([_STORY[place] for place in of_entries], [_LINES[place] for place in of_lines])
    rest, rest_of_lines = list(_STORY), list(_LINES)
    random.Random(seed).shuffle(rest)
    random.Random(seed).shuffle(rest_of_lines)
    ledger.add(rest[:17], rest_of_lines[:9])
    ledger.add(rest, rest_of_lines)
    assert ledger.num_added == len(_STORY) + len(_LINES)
    assert everything(ledger) == _ONCE[0]
    ledger.close()


@settings(max_examples=30)
@stories
def test_any_order_repetition_and_split_gives_the_same(batches, seed):
    with tempfile.TemporaryDirectory() as folder:
        check_story(Sqlite(Path(folder) / FILE), batches, seed)


@settings(max_examples=8)
@stories
def test_any_order_repetition_and_split_gives_the_same_in_postgres(postgres, batches, seed):
    check_story(Postgres(new_schema(postgres)), batches, seed)


def test_lines_that_leave_no_number_out_take_no_room(make_database: Make):
    database = make_database()
    ledger = Ledger(database)
    for first in range(1, 200, 20):
        ledger.add([], [line(number) for number in range(first, first + 20)])
    ledger.add([], [line(250)])
    with database.reading() as session:
        assert session.execute("SELECT source, through FROM line_sources") == [("life", 200)]
        assert session.execute("SELECT number FROM lines") == [(250,)]
    (found,) = ledger.lines(asked(interval=Interval.ALL))
    assert found.cost == Decimal("0.25") * 201
    assert ledger.add([], [line(number) for number in range(1, 260)]) == 58


def test_sums_beyond_64_bits_are_exact(make_database: Make):
    ledger = Ledger(make_database())
    amount = Decimal("9000000.123456789012")  # a row of 1e-12 just holds it: dear dong, cheap GPUs
    entries = [entry(n, prefill_cost=amount, decode_cost=Decimal(0)) for n in range(1_000)]
    ledger.add(entries)
    assert ledger.month_totals("2026-11") == {"acme": 1_000 * amount}
    ledger.add([], [line(n, cost=amount) for n in range(1, 1_001)])
    assert ledger.lines(asked(interval=Interval.ALL))[0].cost == 1_000 * amount


def test_amounts_are_rounded_once_to_what_is_kept(make_database: Make):
    ledger = Ledger(make_database())
    ledger.add([entry(1, prefill_cost=Decimal(1) / 3, decode_cost=Decimal("2.5e-12"))])
    (usage,) = ledger.usage(asked())
    assert usage.prefill_cost == Decimal("0.333333333333")
    assert usage.decode_cost == Decimal("0.000000000002")  # to even


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefill_cost": Decimal("NaN")},
        {"prefill_cost": Decimal("sNaN")},
        {"prefill_cost": Decimal("-Infinity")},
        {"prefill_cost": Decimal("1e40")},
        {"energy_j": math.nan},
        {"energy_j": math.inf},
        {"carbon_g": 1e300},
        {"prompt_tokens": 2**63},
        {"prompt_tokens": 2**53},
    ],
)
def test_a_number_that_is_none_counts_as_0_and_is_told(
    tmp_path: Path, wrong: dict, caplog: pytest.LogCaptureFixture
):
    ledger = Ledger(Sqlite(tmp_path / FILE))
    assert ledger.add([entry(1, **wrong), entry(2)]) == 2
    (usage,) = ledger.usage(asked())
    expected = Entry(request_id="", ended_s=0, route="", outcome="")
    (name,) = wrong
    assert getattr(usage, name) == getattr(expected, name) + getattr(entry(2), name)
    assert usage.num_requests == 2 and f"{1:032x}" in caplog.text


def test_long_texts_stay_different(make_database: Make):
    ledger = Ledger(make_database())
    long = "ü" * 10_000
    ledger.add([entry(n, user=f"{long}{n}") for n in range(3)])
    found = ledger.usage(asked(group_by=("user_name",)))
    assert len({usage.labels["user_name"] for usage in found}) == 3
    assert all(len(usage.labels["user_name"].encode()) <= rows.MAX_TEXT_BYTES for usage in found)
    (one,) = ledger.usage(asked(only={"user_name": f"{long}1"}))
    assert one.prompt_tokens == 11


# ---------------------------------------------------------------------------- versions


def _older(database: Database, version: int, entries: Sequence[Entry]) -> None:
    """Makes a ledger of an older version, with requests in it."""
    with database.writing() as session:
        schema.prepare(session, database.words, "usd", schema.MIGRATIONS[:version])
        if version:
            session.insert("requests", rows.REQUEST, list(map(rows.request_row, entries)), "")


@pytest.mark.parametrize("version", range(len(schema.MIGRATIONS)))
def test_a_ledger_of_each_older_version_becomes_todays(make_database: Make, version: int):
    entries = month_of_entries(300)
    new = Ledger(make_database())
    new.add(entries)
    database = make_database()
    _older(database, version, entries)
    ledger = Ledger(database)
    if version == 0:
        ledger.add(entries)
    assert everything(ledger) == everything(new)
    assert ledger.add(entries) == 0


def test_a_step_that_fails_leaves_the_older_version(make_database: Make):
    database = make_database()
    _older(database, 1, month_of_entries(3))

    def fails(session, words) -> None:
        session.execute("CREATE TABLE half (a BIGINT)")
        session.execute("SELECT nonsense FROM nowhere")

    broken = Ledger(database, migrations=(*schema.MIGRATIONS, fails))
    with pytest.raises(LedgerUnavailable, match="nowhere"):
        broken.month_totals("2026-11")
    with database.reading() as session:
        assert schema.state(session, "schema") == "1"
    with pytest.raises(LedgerUnavailable, match="half"), database.reading() as session:
        session.execute("SELECT * FROM half")
    assert Ledger(database).month_totals("2026-11") == charged(month_of_entries(3))


def test_a_newer_ledger_is_left_alone(make_database: Make):
    database = make_database()
    Ledger(database, migrations=(*schema.MIGRATIONS, lambda session, words: None)).add([entry(1)])
    with pytest.raises(LedgerUnavailable, match=r"has schema version 3, .* is for 2"):
        Ledger(database).add([entry(2)])


def test_servers_that_start_together_make_one_schema(postgres: PostgresServer):
    url = new_schema(postgres)
    errors: list[Exception] = []
    gate = threading.Barrier(4)

    def start(number: int) -> None:
        ledger = Ledger(Postgres(url))
        gate.wait()
        try:
            ledger.add(month_of_entries(50, seed=number))
        except Exception as error:
            errors.append(error)
        ledger.close()

    threads = [threading.Thread(target=start, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    reader = Ledger(Postgres(url))
    (usage,) = reader.usage(asked(interval=Interval.ALL))
    assert usage.num_requests == 50
    reader.close()


def test_a_ledger_has_one_currency(make_database: Make):
    database = make_database()
    Ledger(database, "eur").add([entry(1)])
    with pytest.raises(LedgerUnavailable, match="kept in eur, not in usd"):
        Ledger(database, "usd").add([entry(2)])


# ---------------------------------------------------------------------------- forgetting


def test_old_days_are_forgotten_one_by_one_and_their_sums_kept(make_database: Make):
    ledger = Ledger(make_database())
    entries = [entry(n, ended_s=NOVEMBER_S + n * 3_600, user="u") for n in range(96)]
    ledger.add(entries, [line(1)])
    before = everything(ledger)[2:]
    kept_days = ledger.usage(asked(group_by=("tenant",)))
    assert ledger.forget(NOVEMBER_HOUR + 50) == 49  # rows, hours' sums, and where lines came from
    assert ledger.forget(NOVEMBER_HOUR + 50) == 48
    assert ledger.forget(NOVEMBER_HOUR + 50) == 0
    assert everything_kept(ledger) == before
    assert ledger.usage(asked(group_by=("tenant",))) == kept_days
    later = asked(start_hour=NOVEMBER_HOUR + 48, group_by=("user_name",), interval=Interval.HOUR)
    assert len(ledger.usage(later)) == 48
    with pytest.raises(InvalidRequest, match="keep_days"):
        ledger.usage(asked(group_by=("user_name",)))
    assert ledger.lines(asked())[0].cost == Decimal("0.25")


def everything_kept(ledger: Ledger) -> tuple:
    """What is the same after forgetting."""
    return ledger.month_totals("2026-11"), ledger.month_key_totals("2026-11")


def test_a_clock_in_the_future_forgets_one_day_only(tmp_path: Path):
    ledger = Ledger(Sqlite(tmp_path / FILE))
    ledger.add([entry(n, ended_s=NOVEMBER_S + n * 86_400) for n in range(10)])
    assert ledger.forget(10**6) == 2
    assert len(ledger.usage(asked(start_hour=NOVEMBER_HOUR + 24, group_by=("user_name",)))) == 9


# ---------------------------------------------------------------------------- addresses


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="is a directory"):
        database_at(str(tmp_path), tmp_path)
    assert database_at("", tmp_path).name == str(tmp_path / "ledger.sqlite")
    assert database_at("/data/l.db", tmp_path).name == "/data/l.db"
    monkeypatch.setenv("HOME", "/home/somebody")
    assert database_at("~/l.db", tmp_path).name == "/home/somebody/l.db"
    url = "postgresql://somebody:secret@db.example:5433/billing"
    assert database_at(url, tmp_path).name == "PostgreSQL at db.example"
    with pytest.raises(ConfigError) as told:
        database_at("postgresql://somebody:secret@[db/billing", tmp_path)
    assert "secret" not in told.value.message and told.value.__cause__ is None
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"jaxserve\[postgres\]"):
        database_at(url, tmp_path)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigError, match=r"SQLite 3\.35\.0"):
        database_at("", tmp_path)
