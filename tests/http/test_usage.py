"""/v1/usage and /v1/costs through the whole: keys, a worker, the observer, the ledger."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from jaxserve.config import Config, MeteringConfig
from jaxserve.errors import ConfigError, LedgerUnavailable, Overloaded
from jaxserve.http.auth import Identity, KeyRing
from jaxserve.http.observer.ledger import LedgerPart, open_ledger
from jaxserve.http.observer.messages import Question
from jaxserve.http.observer.observer import METRICS, Observer
from jaxserve.http.observer.parts import check_parts, make_parts
from jaxserve.http.observer.reporter import ObserverLink
from jaxserve.metering.entry import Entry
from jaxserve.metering.ledger.book import Ledger
from jaxserve.metering.ledger.query import Query
from jaxserve.metering.ledger.sqlite import Sqlite
from tests.http.frontend import Front
from tests.http.frontend import front as make_front
from tests.http.test_serve import TIMEOUT_S, address_of, children, command, started

DAY_S = 86_400
HI = {"prompt": "hi", "max_tokens": 2}


def entry(number: int, tenant: str, ended_s: float, **values) -> Entry:
    """A request of somebody."""
    return Entry(
        request_id=str(number),
        ended_s=ended_s,
        route="/v1/completions",
        outcome="done",
        tenant=tenant,
        decode_cost=Decimal("0.125"),
        **values,
    )


def as_key(key: str, **headers: str) -> dict:
    """The options of a request with a key."""
    return {"headers": {"authorization": f"Bearer {key}"} | headers}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """An application whose reporter has an observer with a ledger."""
    folder = tmp_path_factory.mktemp("usage")
    ledger = open_ledger(MeteringConfig(), folder)
    now_s = time.time()
    ledger.add([entry(1, "acme", now_s), entry(2, "acme", now_s), entry(3, "other", now_s)])
    observer = Observer(folder / "o", [LedgerPart(ledger).part], flush_interval_s=0.01)
    link = ObserverLink(folder / "o", 0, interval_s=0.01, max_records=100)
    keys = KeyRing(
        [
            (hashlib.sha256(b"user").digest(), Identity(tenant="acme")),
            (hashlib.sha256(b"admin").digest(), Identity(tenant="ops", admin=True)),
        ]
    )

    async def start() -> None:
        await observer.start()
        link.start()
        while link._writer is None:
            await asyncio.sleep(0.002)

    async def stop() -> None:
        await link.close()
        await observer.close()

    with make_front(keys=keys) as made:
        made.run(start())
        made.app.frontend.reporter = link
        yield made
        made.run(stop())


def test_a_tenant_is_told_what_it_used_and_an_admin_what_all_did(front: Front):
    assert front.get("/v1/usage").status_code == 401
    mine = front.get("/v1/usage?group_by=tenant&interval=all", **as_key("user"))
    assert mine.status_code == 200 and mine.headers["content-type"] == "application/json"
    (result,) = mine.json()["data"][0]["results"]
    assert (result["tenant"], result["num_model_requests"]) == ("acme", 2)
    of_all = front.get("/v1/costs?group_by=tenant&interval=all", **as_key("admin")).json()
    assert [(r["tenant"], r["amount"]) for r in of_all["data"][0]["results"]] == [
        ("acme", {"value": 0.25, "currency": "usd"}),
        ("other", {"value": 0.125, "currency": "usd"}),
    ]


def test_refusals_have_openais_body(front: Front):
    wrong = front.get("/v1/costs?interval=week", **as_key("user"))
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "interval"
    others = front.get("/v1/costs?tenant=other", **as_key("user"))
    assert others.status_code == 403 and others.json()["error"]["code"] == "forbidden"
    lines = front.get("/v1/costs?group_by=line_item", **as_key("user"))
    assert lines.status_code == 403
    assert front.post("/v1/costs", {}, **as_key("admin")).status_code == 405


@pytest.mark.parametrize("priority", [10**30, -(10**30), 2**64])
def test_a_priority_beyond_all_bounds_is_refused_and_reports_go_on(front: Front, priority: int):
    refused = front.post("/v1/completions", HI | {"priority": priority}, **as_key("user"))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority"
    front.run(asyncio.sleep(0.05))  # it is reported
    reports = [task for task in front.app.frontend.reporter._tasks if not task.done()]
    assert len(reports) == 2


def test_csv_by_parameter_and_by_header(front: Front):
    asked = front.get("/v1/usage?format=csv", **as_key("admin"))
    accepted = front.get("/v1/usage", **as_key("admin", accept="text/csv"))
    assert asked.headers["content-type"] == "text/csv; charset=utf-8"
    assert asked.text == accepted.text and asked.text.startswith("start,end,num_model_requests,")
    both = front.get("/v1/usage?format=json", **as_key("admin", accept="text/csv"))
    assert both.headers["content-type"] == "application/json"


def test_a_ledger_that_is_away_is_503_and_told_in_the_metrics(tmp_path: Path):
    (tmp_path / "file").write_text("")
    ledger = Ledger(Sqlite(tmp_path / "file" / "ledger"))
    with pytest.raises(LedgerUnavailable):
        ledger.add([entry(1, "acme", 0)])

    async def ask() -> None:
        observer = Observer(tmp_path / "o", [LedgerPart(ledger).part], flush_interval_s=0.01)
        await observer.start()
        link = ObserverLink(tmp_path / "o", 0, interval_s=0.01, max_records=100)
        link.start()
        while link._writer is None:
            await asyncio.sleep(0.002)
        answer = await link.ask(Question(id=0, name="costs", admin=True))
        assert answer.status == 503 and b"ledger_unavailable" in answer.body
        metrics = (await link.ask(Question(id=0, name=METRICS))).body.decode()
        assert "jaxserve_ledger_up 0.0" in metrics
        assert 'jaxserve_observer_faults_total{part="ledger"} 0.0' in metrics  # nothing is broken
        await link.close()
        await observer.close()

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_a_crowd_of_questions_is_refused_not_kept(tmp_path: Path):
    ledger = Ledger(Sqlite(tmp_path / "ledger"))
    part = LedgerPart(ledger)
    question = Question(id=0, name="usage", admin=True)

    async def work() -> None:
        answers = await asyncio.gather(
            *(part.usage(question) for _ in range(100)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert len(refused) == 100 - 34  # two run, 32 wait
        assert all(answer.status == 200 for answer in answers if answer not in refused)
        assert (await part.usage(question)).status == 200
        await part.close()

    asyncio.run(work())


def test_each_hour_the_oldest_day_that_is_too_old_is_forgotten(tmp_path: Path):
    ledger = Ledger(Sqlite(tmp_path / "ledger"))
    now_s = 20_000 * DAY_S + 5.0
    ledger.add(
        [entry(n, "acme", now_s - n * DAY_S, user="u") for n in range(40)],
    )
    elapsed_s = 0.0

    def kept_days() -> int:
        with ledger._database.reading() as session:
            return session.execute("SELECT COUNT(*) FROM requests")[0][0]

    async def work() -> None:
        nonlocal elapsed_s
        made = LedgerPart(ledger, keep_days=30, clock_s=lambda: now_s, elapsed_s=lambda: elapsed_s)
        for hour in range(12):
            elapsed_s = 3_600.0 * hour
            await made.tick()
            await made.tick()
            if made._forgetting is not None:
                await made._forgetting
            assert kept_days() == max(40 - hour, 31)
        await made.close()

    asyncio.run(work())
    query = Query(start_hour=0, end_hour=20_001 * 24, group_by=("tenant",))
    assert sum(usage.num_requests for usage in ledger.usage(query)) == 40
    ledger.close()


def test_settings(tmp_path: Path):
    parts = make_parts(Config(), tmp_path, lambda *_: None, lambda *_: None)
    assert "ledger" in [part.name for part in parts]
    off = Config(metering=MeteringConfig(enabled=False))
    assert "ledger" not in [
        part.name for part in make_parts(off, tmp_path, lambda *_: None, lambda *_: None)
    ]
    check_parts(Config())
    with pytest.raises(ConfigError, match=r"metering\.ledger"):
        check_parts(Config(metering=MeteringConfig(ledger="postgresql://[wrong")))
    assert not (tmp_path / "ledger.sqlite").exists()  # made when it is first used


def test_a_server_answers_from_its_ledger_also_after_its_observer_was_killed(tmp_path: Path):
    path = tmp_path / "ledger"
    ledger = Ledger(Sqlite(path))
    ledger.add([entry(1, "acme", time.time())])
    ledger.close()

    def costs(client: httpx.Client) -> httpx.Response:
        """Asks until the observer is there."""
        for _ in range(600):
            answer = client.get("/v1/costs?interval=all&tenant=acme")
            if answer.status_code != 503:
                return answer
            time.sleep(0.05)
        pytest.fail("there is no observer")

    with started(f"metering.ledger={path}") as process:
        base = address_of(process)
        with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
            first = costs(client)
            assert first.status_code == 200
            assert first.json()["data"][0]["results"][0]["num_model_requests"] == 1
            (observer,) = [pid for pid in children(process.pid) if "observer" in command(pid)]
            os.kill(observer, signal.SIGKILL)
            assert client.post("/v1/completions", json=HI).status_code == 200  # it serves
            again = costs(client)
            assert (again.status_code, again.json()) == (200, first.json())
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
