"""What /v1/usage and /v1/costs answer, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from decimal import Decimal

import pytest

from jaxserve.errors import Forbidden, InvalidRequest, JaxserveError
from jaxserve.metering.entry import LineKind
from jaxserve.metering.ledger.book import FILE, Ledger
from jaxserve.metering.ledger.sqlite import Sqlite
from jaxserve.metering.reports import costs_report, read_question, usage_report
from tests.metering.ledger.entries import NOVEMBER_HOUR, NOVEMBER_S, entry, line

NOW_S = NOVEMBER_S + 3 * 86_400 + 1_000.5
HALF = {"prefill_cost": Decimal("0.5"), "decode_cost": Decimal("0.25")}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """Two tenants on two days, and two hours' lines."""
    made = Ledger(Sqlite(tmp_path_factory.mktemp("reports") / FILE))
    made.add(
        [
            entry(1, user="ann", adapter="law", **HALF),
            entry(2, user="=cmd()", **HALF),
            entry(3, ended_s=NOVEMBER_S + 86_400 + 60, user="ann", wasted_cost=Decimal(2), **HALF),
            entry(4, tenant="other", ended_s=NOVEMBER_S + 3_600, model="big", **HALF),
        ],
        [
            line(1, kind=LineKind.HARDWARE, cost=Decimal(4), duration_ns=3_600 * 10**9),
            line(2, kind=LineKind.ENERGY, cost=Decimal("0.5"), energy_j=7.0, carbon_g=0.5),
            line(3, kind=LineKind.BUSY, cost=Decimal(2), duration_ns=10**9),
            line(4, kind=LineKind.IDLE, cost=Decimal("2.5"), duration_ns=3_599 * 10**9),
            line(5, kind=LineKind.IDLE, hour=NOVEMBER_HOUR + 30, cost=Decimal(1)),
        ],
    )
    yield made
    made.close()


def usage(ledger: Ledger, who: str = "ops", admin: bool = True, **parameters: str) -> dict:
    """The document of /v1/usage."""
    kind, body = usage_report(ledger, parameters, who, admin, NOW_S)
    assert kind == "application/json"
    return json.loads(body, parse_float=Decimal)


def costs(ledger: Ledger, who: str = "ops", admin: bool = True, **parameters: str) -> dict:
    """The document of /v1/costs."""
    kind, body = costs_report(ledger, "usd", parameters, who, admin, NOW_S)
    assert kind == "application/json"
    return json.loads(body, parse_float=Decimal)


def test_without_parameters_it_is_the_last_30_days_by_day(ledger: Ledger):
    document = usage(ledger)
    assert (document["object"], document["has_more"], document["next_page"]) == (
        "page",
        False,
        None,
    )
    first, second = document["data"]
    assert (first["start_time"], first["end_time"]) == (NOVEMBER_S, NOVEMBER_S + 86_400)
    assert second["start_time"] == NOVEMBER_S + 86_400
    (result,) = first["results"]
    assert result == {
        "object": "usage.result",
        "num_model_requests": 3,
        "input_tokens": 37,
        "input_cached_tokens": 12,
        "output_tokens": 60,
        "device_s": Decimal("0.000009007"),
        "energy_j": Decimal("0.375"),
        "carbon_g": Decimal("0.000012"),
        "tenant": None,
        "key": None,
        "user": None,
        "model": None,
        "adapter": None,
    }
    assert usage(ledger, **{"from": str(NOVEMBER_S + 86_400)})["data"] == [second]


def test_costs_are_exact_and_grouped(ledger: Ledger):
    document = costs(ledger, group_by="tenant,model", interval="all")
    (bucket,) = document["data"]
    assert [(r["tenant"], r["model"], r["amount"]["value"]) for r in bucket["results"]] == [
        ("acme", "smollm2", Decimal("2.25")),
        ("other", "big", Decimal("0.75")),
    ]
    result = bucket["results"][0]
    assert result["amount"]["currency"] == "usd" and result["line_item"] is None
    assert (result["prefill"], result["decode"]) == (Decimal("1.5"), Decimal("0.75"))
    assert result["wasted"] == Decimal("2.000000000002")
    by_user = costs(ledger, user="ann", interval="month")
    assert by_user["data"][0]["results"][0]["amount"]["value"] == Decimal("1.5")
    assert (
        costs(ledger, adapter="", group_by="adapter", interval="all")["data"][0]["results"][0][
            "num_model_requests"
        ]
        == 3
    )  # the base model alone


def test_a_tenant_sees_itself_only(ledger: Ledger):
    document = costs(ledger, "other", admin=False, group_by="tenant", interval="all")
    (result,) = document["data"][0]["results"]
    assert (result["tenant"], result["num_model_requests"]) == ("other", 1)
    assert "wasted" not in result
    assert costs(ledger, "other", admin=False, tenant="other", interval="all")["data"]
    assert usage(ledger, "nobody", admin=False)["data"] == []
    for parameters in ({"tenant": "acme"}, {"tenant": ""}, {"group_by": "line_item"}):
        for ask in (costs, usage):
            with pytest.raises(Forbidden):
                ask(ledger, "other", admin=False, **parameters)


def test_line_items_add_up(ledger: Ledger):
    document = costs(ledger, group_by="line_item", interval="hour")
    first = {r["line_item"]: r for r in document["data"][0]["results"]}
    amounts = {name: r["amount"]["value"] for name, r in first.items()}
    assert amounts == {
        "hardware": 4, "energy": Decimal("0.5"), "busy": 2, "idle": Decimal("2.5"),
        "charged": Decimal("1.5"), "waste": Decimal("0.5"),
    }  # fmt: skip
    assert amounts["charged"] + amounts["waste"] + amounts["idle"] == 4.5
    assert (first["hardware"]["duration_s"], first["energy"]["energy_j"]) == (3600, 7)
    assert [b["start_time"] for b in document["data"]] == [
        NOVEMBER_S + hour * 3600 for hour in (0, 1, 24, 30)
    ]
    whole = costs(ledger, group_by="line_item", interval="all", limit="3")
    assert len(whole["data"][0]["results"]) == 3 and whole["next_page"] == "3"
    rest = costs(ledger, group_by="line_item", interval="all", limit="3", page="3")
    names = [r["line_item"] for d in (whole, rest) for r in d["data"][0]["results"]]
    assert names == ["busy", "charged", "energy", "hardware", "idle", "waste"]
    assert not rest["has_more"]


def test_pages(ledger: Ledger):
    seen, page = [], "0"
    while page is not None:
        document = usage(ledger, group_by="user", interval="hour", limit="2", page=page)
        seen += [r["user"] for bucket in document["data"] for r in bucket["results"]]
        page = document["next_page"]
        assert document["has_more"] == (page is not None)
    assert seen == ["=cmd()", "ann", "", "ann"]


def test_csv_is_no_spreadsheets_formula(ledger: Ledger):
    kind, body = costs_report(
        ledger, "usd", {"format": "csv", "group_by": "user", "interval": "all"}, "ops", True, NOW_S
    )
    assert kind.startswith("text/csv")
    found = list(csv.DictReader(io.StringIO(body.decode())))
    assert [row["user"] for row in found] == ["", "'=cmd()", "ann"]
    assert found[2] | {"start": "", "end": ""} == {
        "start": "", "end": "", "amount": "1.5", "currency": "usd", "prefill": "1",
        "decode": "0.5", "wasted": "2.000000000001", "num_model_requests": "2", "user": "ann",
    }  # fmt: skip
    assert found[0]["start"] == "2026-10-06T00:00Z" and found[0]["end"] == "2026-11-05T00:00Z"
    kind, body = usage_report(ledger, {"format": "csv", "tenant": "no"}, "ops", True, NOW_S)
    assert body == b""


@pytest.mark.parametrize(
    ("words", "hours"),
    [
        ({"from": "2026-11-02", "to": "2026-11-03"}, (24, 48)),
        ({"start_time": str(NOVEMBER_S + 3_700), "end_time": str(NOVEMBER_S + 7_201)}, (1, 3)),
        ({"from": "2026-11-01T02:30+01:00", "to": "2026-11-01T05:00Z"}, (1, 5)),
        ({"from": "2026-11-02"}, (24, 96)),
    ],
)
def test_times_are_rounded_to_whole_hours(ledger: Ledger, words: dict, hours: tuple[int, int]):
    query = read_question(words, "ops", True, NOW_S).query
    assert (query.start_hour - NOVEMBER_HOUR, query.end_hour - NOVEMBER_HOUR) == hours


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"from": "yesterday"}, "from"),
        ({"from": "-5"}, "from"),
        ({"to": "9" * 40}, "to"),
        ({"from": "2026-11-03", "to": "2026-11-02"}, "from"),
        ({"from": "2099-01-01"}, "from"),
        ({"interval": "week"}, "interval"),
        ({"bucket_width": "1m"}, "interval"),
        ({"group_by": "tenant,planet"}, "group_by"),
        ({"group_by": "line_item,tenant"}, "group_by"),
        ({"group_by": "line_item", "model": "big"}, "group_by"),
        ({"limit": "0"}, "limit"),
        ({"limit": "10001"}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"page": "-1"}, "page"),
        ({"page": "0" * 20 + "9" * 30}, "page"),
        ({"page": "0" * 20 + "9" * 5000}, "page"),
        ({"format": "xml"}, "format"),
        ({"colour": "red"}, "colour"),
        ({"from": "2026-11-01", "start_time": "1"}, "start_time"),
    ],
)
def test_what_is_wrong_is_named(ledger: Ledger, parameters: dict, named: str):
    with pytest.raises(InvalidRequest) as told:
        costs(ledger, **parameters)
    assert told.value.param == named and told.value.status == 400


def test_only_costs_have_line_items(ledger: Ledger):
    with pytest.raises(InvalidRequest, match="only /v1/costs"):
        usage(ledger, group_by="line_item")


@pytest.mark.parametrize("interval", ["hour", "day", "month", "all"])
@pytest.mark.parametrize("bounds", [{"from": "0"}, {"from": "0001-01-02", "to": "9999-12-30"}])
def test_any_time_may_be_asked_for(ledger: Ledger, interval: str, bounds: dict):
    try:
        document = usage(ledger, interval=interval, **bounds)
    except JaxserveError as error:
        pytest.fail(error.message)
    assert sum(r["num_model_requests"] for b in document["data"] for r in b["results"]) == 4
