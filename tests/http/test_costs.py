"""The price in an answer is the one in the ledger; budgets warn, and then refuse."""

from __future__ import annotations

import calendar
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import openai
import pytest

from jaxserve.config import EmbeddingsConfig, HttpConfig, MeteringConfig
from jaxserve.errors import BudgetExceeded, ConfigError
from jaxserve.http.auth import Identity, KeyRing
from jaxserve.http.costs import Costs
from jaxserve.http.keyfile import load_keys
from jaxserve.http.observer.reporter import NoReporter
from jaxserve.metering.budgets import Budget
from jaxserve.metering.pricing import entry_of
from jaxserve.protocol.records import Outcome, RequestRecord
from tests.http.frontend import CONFIG, Front
from tests.http.frontend import front as make_front
from tests.http.test_streams import CHAT

CONFIGURED = MeteringConfig(
    currency="EUR", hardware_per_hour=36, power="modelled", idle_watts=100, busy_watts=500
)
STEP_NS = 1_000_000
HI = [{"role": "user", "content": "hi"}]
BODY = {"messages": HI, "seed": 1, "max_tokens": 5, "ignore_eos": True, "include_cost": True}
NOVEMBER_S = calendar.timegm((2026, 11, 26, 0, 0, 0))


class Telling(NoReporter):
    """Keeps records, and has been told things."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.topics: dict[str, bytes] = {}

    def ended(self, record: RequestRecord) -> None:
        self.records.append(record)

    def told(self, topic: str) -> bytes | None:
        return self.topics.get(topic)


@pytest.fixture
def reporter() -> Telling:
    return Telling()


@pytest.fixture(name="front")
def _front(reporter: Telling) -> Iterator[Front]:
    config = dataclasses.replace(CONFIG, embeddings=EmbeddingsConfig(model="fake"))
    with make_front(config=config, reporter=reporter, metering=CONFIGURED) as made:
        made.engine.engine.executor.device_ns = STEP_NS
        yield made


def check(answer: dict, record: RequestRecord) -> None:
    """What an answer says of its cost is what the ledger will have."""
    cost = record.cost
    assert cost is not None
    entry = entry_of(record, cost, 0)
    assert Decimal(str(answer["total"])) == entry.cost > 0
    assert Decimal(str(answer["prefill"])) == entry.prefill_cost > 0
    assert Decimal(str(answer["decode"])) == entry.decode_cost
    assert answer["currency"] == "EUR"
    device_ns = entry.prefill_device_ns + entry.decode_device_ns
    assert answer["device_ms"] == device_ns / 1e6 > 0
    assert answer["energy_j"] == pytest.approx(500 * device_ns / 1e9)
    # 36 an hour are a hundredth a second; energy has no price
    assert entry.cost == pytest.approx(Decimal(device_ns) / 10**11)


def test_an_answer_tells_its_cost(front: Front, reporter: Telling):
    response = front.post(CHAT, BODY)
    (record,) = reporter.records
    check(response.json()["usage"]["cost"], record)
    assert response.headers["x-request-cost"] == f"{record.cost.total:f} EUR"


def test_a_stream_tells_its_cost_at_its_end_with_its_usage_or_alone(
    front: Front, reporter: Telling
):
    for options in ({}, {"stream_options": {"include_usage": True}}):
        response = front.post(CHAT, BODY | {"stream": True} | options)
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
        usage = json.loads(events[-1])["usage"]
        check(usage["cost"], reporter.records[-1])
        assert usage["completion_tokens"] == 5
        assert "x-request-cost" not in response.headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 3}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 3}),
        ("/v1/embeddings", {"input": ["hello", "you"]}),
        ("/v1/score", {"text_1": "hello", "text_2": "you"}),
        ("/v1/rerank", {"query": "hello", "documents": ["you", "me"]}),
    ],
)
def test_all_that_ask_for_work_tell_it(front: Front, reporter: Telling, path: str, body: dict):
    answer = front.ok(path, body | {"include_cost": True})
    check(answer["usage"]["cost"], reporter.records[-1])
    assert "cost" not in front.ok(path, body)["usage"]
    assert "cost" not in front.ok(path, body | {"include_cost": False})["usage"]


def test_a_streamed_response_tells_it(front: Front, reporter: Telling):
    body = {"input": "hello", "max_output_tokens": 3, "stream": True, "include_cost": True}
    text = front.post("/v1/responses", body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    check(events[-1]["response"]["usage"]["cost"], reporter.records[-1])


def test_streamed_costs_what_unstreamed_does(front: Front, reporter: Telling):
    for index, stream in enumerate((True, False)):
        content = [{"role": "user", "content": f"say {index}"}]
        front.post(CHAT, BODY | {"messages": content, "stream": stream})
    first, second = (record.cost.total for record in reporter.records)
    assert first == second > 0


def test_the_rate_is_the_observers(front: Front, reporter: Telling):
    reporter.topics["rate"] = json.dumps({"watts": 50.0}).encode()
    answer = front.ok(CHAT, BODY)
    cost = answer["usage"]["cost"]
    assert cost["energy_j"] == pytest.approx(50 * cost["device_ms"] / 1e3)


@pytest.mark.parametrize("value", ["yes", 1, 0, [], {}])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
def test_what_is_neither_yes_nor_no_is_refused(front: Front, path: str, value):
    body = {"messages": HI} if path == CHAT else {"input": "hello"}
    response = front.post(path, body | {"include_cost": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "include_cost"


def test_where_nobody_computes_costs_they_are_refused():
    with make_front() as front:
        response = front.post(CHAT, BODY)
        assert response.status_code == 400 and "metering.enabled" in response.text
        assert front.post(CHAT, BODY | {"include_cost": False}).status_code == 200


def test_openais_client_asks_and_reads_it(front: Front):
    client = openai.AsyncOpenAI(
        base_url="http://front/v1", api_key="x", http_client=front.http, max_retries=0
    )

    async def ask():
        return await client.chat.completions.create(
            model="fake", messages=HI, max_tokens=3, extra_body={"include_cost": True}
        )

    answer = front.run(ask())
    assert answer.usage.model_extra["cost"]["currency"] == "EUR"


# ---------------------------------------------------------------------------- budgets


def keys(budget: Budget) -> KeyRing:
    digest = hashlib.sha256(b"secret").digest()
    return KeyRing([(digest, Identity(tenant="acme", key="ci", budget=budget))])


def spent(amount: str, month: str = "2026-11") -> bytes:
    return json.dumps({"month": month, "spent": {"acme": amount}}).encode()


@pytest.mark.parametrize("status", ["402", "429"])
def test_a_tenant_is_warned_then_refused_then_let_in_again(reporter: Telling, status: str):
    config = MeteringConfig(over_budget_status=status, currency="EUR")
    ring = keys(Budget(soft=Decimal(10), hard=Decimal(20)))
    with make_front(keys=ring, reporter=reporter, metering=config) as front:
        front.http.headers["authorization"] = "Bearer secret"
        now_s = [NOVEMBER_S]
        front.app.frontend.costs._wall_s = lambda: now_s[0]
        body = {"messages": HI, "max_tokens": 2}
        reporter.topics["budgets"] = spent("9.99")
        response = front.post(CHAT, body)
        assert response.status_code == 200 and "x-budget-spent" not in response.headers
        reporter.topics["budgets"] = spent("12.5")
        response = front.post(CHAT, body)
        assert response.status_code == 200
        assert response.headers["x-budget-limit"] == "20"
        assert response.headers["x-budget-spent"] == "12.500000"
        assert response.headers["x-budget-reset"] == "2026-12-01T00:00:00Z"
        reporter.topics["budgets"] = spent("20.01")
        response = front.post(CHAT, body)
        assert response.status_code == int(status)
        error = response.json()["error"]
        assert error["code"] == ("budget_exceeded" if status == "402" else "budget_limited")
        for word in ("20.01", "20 EUR", "2026-12-01"):
            assert word in error["message"]
        assert response.headers["x-should-retry"] == "false"
        if status == "429":
            assert int(response.headers["retry-after"]) == 5 * 86400
        assert reporter.records[-1].outcome is Outcome.LIMITED
        assert front.post("/v1/embeddings", {"input": "x"}).status_code in (404, int(status))
        now_s[0] += 5 * 86400  # the month is over, and nobody has said so yet
        assert front.post(CHAT, body).status_code == 200


@pytest.mark.parametrize(("limit", "shown"), [("1e+6", b"1000000"), ("1e-7", b"0.0000001")])
def test_a_limit_is_told_without_an_exponent(limit: str, shown: bytes):
    costs = Costs(
        MeteringConfig(), lambda topic: spent("1"), enabled=True, wall_s=lambda: NOVEMBER_S
    )
    budget = Budget(soft=Decimal("1e-8"), hard=Decimal(limit))
    headers: dict[bytes, bytes] = {}
    with contextlib.suppress(BudgetExceeded):
        costs.admit({"jaxserve.headers": headers}, Identity(tenant="acme", budget=budget))
    assert headers[b"x-budget-limit"] == shown


def test_one_limit_of_the_two_is_enough():
    told = spent("15")
    for budget, refused in ((Budget(soft=Decimal(10)), False), (Budget(hard=Decimal(15)), True)):
        costs = Costs(MeteringConfig(), lambda topic: told, enabled=True, wall_s=lambda: NOVEMBER_S)
        headers: dict[bytes, bytes] = {}
        identity = Identity(tenant="acme", budget=budget)
        with pytest.raises(BudgetExceeded) if refused else contextlib.nullcontext():
            costs.admit({"jaxserve.headers": headers}, identity)
        assert headers[b"x-budget-spent"] == b"15.000000"


def test_without_a_word_of_the_observer_nobody_is_refused():
    costs = Costs(MeteringConfig(), lambda topic: None, enabled=True)
    headers: dict[bytes, bytes] = {}
    identity = Identity(tenant="acme", budget=Budget(hard=Decimal("0.01")))
    costs.admit({"jaxserve.headers": headers}, identity)
    assert headers == {}


def test_a_tenants_row_in_the_key_file_has_its_budget(tmp_path: Path):
    file = tmp_path / "keys.yaml"
    tenants = [{"name": "acme", "budget": {"soft": 100, "hard": 120}}, {"name": "free"}]
    rows = [
        {"hash": hashlib.sha256(name.encode()).hexdigest(), "tenant": name}
        for name in ("acme", "free", "rowless")
    ]
    file.write_text(json.dumps({"tenants": tenants, "keys": rows}))
    ring = load_keys(HttpConfig(key_file=str(file)))
    assert ring.identify(b"Bearer acme").budget == Budget(soft=Decimal(100), hard=Decimal(120))
    assert ring.identify(b"Bearer free").budget is None
    assert ring.budgets == {"acme": Budget(soft=Decimal(100), hard=Decimal(120))}
    tenants[0]["budget"] = {"soft": "lots"}
    file.write_text(json.dumps({"tenants": tenants, "keys": rows}))
    with pytest.raises(ConfigError, match="tenant 1 .*budget: soft"):
        load_keys(HttpConfig(key_file=str(file)))
