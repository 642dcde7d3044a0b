"""Dates and times in schemas: those that there are, as `datetime` reads them."""

from __future__ import annotations

import json
from datetime import date, datetime, time
from typing import Any

import pytest

from jaxserve.config import StructuredConfig
from jaxserve.structured import grammars
from jaxserve.structured.formats import with_real_dates
from jaxserve.structured.matcher import Compiled, compile_grammar
from tests.fakes.engine import VOCAB_SIZE
from tests.fakes.grammar import TABLE

TIMES = ("00:00:00Z", "23:59:59Z", "23:59:60Z", "12:00:60+01:00", "07:08:09.123456-11:30")


def compiled(schema: dict[str, Any]) -> Compiled:
    return compile_grammar(grammars.json_schema(schema), TABLE, StructuredConfig(), VOCAB_SIZE)


def admits(grammar: Compiled, value: Any) -> bool:
    ids = list(json.dumps(value).encode())
    matcher = grammar.matcher().ll
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def exists(kind: type[date | time], text: str) -> bool:
    try:
        kind.fromisoformat(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("year", [0, 4, 1900, 2000, 2023, 2024, 9999])
def test_every_day_of_a_year(year: int) -> None:
    dates, moments = (compiled({"type": "string", "format": f}) for f in ("date", "date-time"))
    for month in range(14):
        for day in range(33):
            text = f"{year:04}-{month:02}-{day:02}"
            assert admits(dates, text) == exists(date, text), text
            assert admits(moments, f"{text}T12:00:00Z") == exists(date, text), text


@pytest.mark.parametrize("text", TIMES)
def test_times_of_a_day(text: str) -> None:
    assert admits(compiled({"format": "time"}), text) == exists(time, text)
    moment = f"2024-02-29T{text}"
    assert admits(compiled({"format": "date-time"}), moment) == exists(datetime, moment)


def test_what_stands_beside_is_held_to_as_well() -> None:
    beside = {"pattern": "^2", "allOf": [{"maxLength": 10}, {"pattern": "-0.-"}]}
    dates = compiled({"type": ["string", "null"], "format": "date"} | beside)
    assert admits(dates, "2024-02-29") and admits(dates, None)
    for text in ("1024-02-29", "2024-12-01", "2023-02-29"):
        assert not admits(dates, text), text


def test_data_that_looks_like_a_schema_stays_as_it_is() -> None:
    data = {"format": "date"}
    schema = {
        "properties": {"format": {"type": "string"}, "enum": {"enum": [data]}},
        "const": data,
        "default": data,
    }
    assert with_real_dates(schema) == schema
    assert admits(compiled({"const": data}), data)
    named = {"properties": {"enum": {"format": "date"}}}
    assert with_real_dates(named) != named, "a property by that name"
