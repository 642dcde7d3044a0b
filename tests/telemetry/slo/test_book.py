"""Counting: equal to a recount of the records, in all windows, once for each request."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.telemetry.slo.book import COARSE_S, FINE_S
from jaxserve.telemetry.slo.judge import Verdict
from jaxserve.telemetry.slo.report import report
from tests.telemetry.slo.simulation import CHAT, MS, S, Server, asked

OBJECTIVES = (
    "p99 ttft < 100 ms",
    "p90 ttft < 100 ms period=7d",
    "p99 tpot < 20 ms tenant=acme|b*",
    "p95 e2e < 2 s priority=high",
    "error_rate < 0.1% adapter=support",
    "availability > 99.9%",
)
#: Verdicts of our fault, written again.
FAULTS = {"late", "shed", "errored", "expired"}


def random_record(rng: random.Random, done_ns: int, number: int) -> RequestRecord:
    """A request of any kind, drawn so that all verdicts come often."""
    outcome = rng.choices(list(Outcome), [80, 4, 3, 3, 3, 3, 4])[0]
    arrived_ns = done_ns - rng.randrange(1, 3 * S)
    route = rng.choices([CHAT, "/v1/embeddings"], [9, 1])[0]
    fields: dict[str, Any] = {}
    if route == CHAT and rng.random() < 0.9:
        fields["first_token_ns"] = arrived_ns + min(
            rng.choice([99_999_999, 100_000_000, rng.randrange(200 * MS)]), done_ns - arrived_ns
        )
        tokens = rng.choice([0, 1, 7])
        fields |= {"decode_tokens": tokens, "decode_ns": tokens * rng.randrange(40 * MS)}
    if rng.random() < 0.95:
        fields["read_ns"] = arrived_ns + 1
    return RequestRecord(
        request_id=f"{number:032x}",
        route=route,
        arrived_ns=arrived_ns,
        done_ns=done_ns,
        outcome=outcome,
        model="m",
        tenant=rng.choice(["acme", "beta", "gamma"]),
        priority=rng.choice([-10, 0, 10]),
        adapter=rng.choice(["support", ""]),
        completion_tokens=rng.randrange(50),
        asked=asked(rng.choice([1, 100])),
        **fields,
    )


def recount(text: str, record: RequestRecord) -> str | None:
    """The verdict as docs/slo.md has it, read off the text of an objective."""
    words = dict(word.split("=") for word in text.split() if "=" in word)
    generating = record.route == CHAT
    if ("ttft" in text or "tpot" in text) and not generating:
        return None
    if "tenant" in words and record.tenant not in ("acme", "beta"):
        return None
    if "priority" in words and record.priority >= 0:
        return None
    if "adapter" in words and record.read_ns and record.adapter != "support":
        return None
    match record.outcome:
        case Outcome.REFUSED | Outcome.LIMITED:
            return str(record.outcome)
        case Outcome.SHED | Outcome.FAILED | Outcome.EXPIRED:
            if "tpot" in text and record.asked.max_tokens == 1:
                return "unmeasured"
            return "errored" if record.outcome == Outcome.FAILED else str(record.outcome)
    left = record.outcome == Outcome.LEFT
    whole_ns = record.done_ns - record.arrived_ns
    if "ttft" in text:
        if not record.first_token_ns and not left:
            return "unmeasured"
        late = ((record.first_token_ns or record.done_ns) - record.arrived_ns) >= 100 * MS
    elif "tpot" in text:
        if not record.decode_tokens:
            return "cancelled" if left else "unmeasured"
        late = record.decode_ns / record.decode_tokens >= 20 * MS
    elif "e2e" in text:
        late = whole_ns >= 2 * S
    else:
        late = left and "availability" in text and not record.first_token_ns and whole_ns >= 5 * S
    if left:
        return "late" if late else "cancelled"
    return "late" if late else "good"


@pytest.mark.slow
def test_100_000_requests_are_counted_as_an_offline_recount_says(tmp_path: Path):
    server = Server(tmp_path, *OBJECTIVES)
    rng = random.Random(7)
    started_ns = server.clocks.ns
    records = []
    for number in range(100_000):
        server.clocks.advance(rng.expovariate(1 / 0.9))  # in all about a day
        heard_after_ns = rng.randrange(600 * S if number % 20 == 0 else 200 * MS)
        record = random_record(rng, server.clocks.ns - heard_after_ns, number)
        server.compliance.ended(record)
        records.append(record)
        if number % 500 == 0:
            server.compliance.tick()
    server.compliance.tick()
    end_s = server.compliance.now_s
    assert server.clocks.ns - started_ns > 20 * 3600 * S

    for text, objective in zip(OBJECTIVES, server.compliance.objectives, strict=True):
        tally = server.compliance.book.tally(objective)
        recounted = [
            (server.compliance.timeline.at_s(record.done_ns), recount(text, record))
            for record in records
        ]
        windows = [(w, FINE_S) for w in (300, 1800, 3600, 21600)]
        windows += [(w, COARSE_S) for w in (3 * 86400, objective.period_s)]
        expected: Counter[str | None] = Counter()
        for window_s, width_s in windows:
            oldest = end_s // width_s - window_s // width_s
            expected = Counter(v for at_s, v in recounted if at_s // width_s > oldest)
            expected.pop(None, None)
            counted = {
                Verdict(column).name.lower(): count
                for column, count in enumerate(tally.verdicts(window_s))
                if count
            }
            assert counted == expected, (text, window_s)
        assert set(expected) >= {"good", "shed", "cancelled", "refused", "limited"}
        document = next(
            o for o in report(server.compliance)["objectives"] if o["name"] == objective.name
        )
        bad = sum(expected[verdict] for verdict in FAULTS)
        assert (document["good"], document["bad"]) == (expected["good"], bad)
        share = expected["good"] / (expected["good"] + bad)
        assert document["compliance_percent"] == pytest.approx(100 * share, rel=1e-12)

    good = [
        record
        for record in records
        if record.outcome == Outcome.DONE
        and not FAULTS & {recount(text, record) for text in OBJECTIVES}
    ]
    book = server.compliance.book
    assert 0.1 < len(good) / len(records) < 0.9
    assert book.num_good_requests == len(good)
    assert book.num_good_tokens == sum(record.completion_tokens for record in good)


def test_an_answer_of_one_token_has_no_tpot(tmp_path: Path):
    server = Server(tmp_path, "p99 tpot < 20 ms")
    for _ in range(50):
        server.end(decode_tokens=0, decode_ns=0, completion_tokens=1)
    objective = server.objective()
    assert (objective["good"], objective["bad"]) == (0, 0)
    assert objective["not_counted"]["unmeasured"] == 50
    assert objective["compliance_percent"] is None and objective["met"] is None
    assert objective["budget"]["left_share"] == 1
    assert set(objective["burn_rates"].values()) == {0}


def test_counts_leave_their_windows(tmp_path: Path):
    server = Server(tmp_path, "error_rate < 1%")
    server.end(outcome=Outcome.FAILED)
    tally = server.compliance.tallies()[0]
    for window_s in (300, 1800, 3600, 21600, 3 * 86400, 28 * 86400):
        server.clocks.advance(window_s - 301 - (server.clocks.ns - 1_000_000 * S) / S)
        server.compliance.tick()
        assert tally.count(window_s).bad == (1 if window_s > 300 else 0) or window_s == 300
        server.clocks.advance(602)
        server.compliance.tick()
        assert tally.count(window_s).bad == 0
    assert tally.totals[Verdict.ERRORED] == 1  # counters never go back


def test_an_overdue_request_counts_as_bad_once(tmp_path: Path):
    server = Server(tmp_path, "availability > 99%", "p99 ttft < 100 ms", "p99 e2e < 20 s")
    server.clocks.advance(60)
    begun = server.begin()

    def bad() -> list[int]:
        return [server.objective(index)["bad"] for index in range(3)]

    assert bad() == [0, 0, 0]
    server.clocks.advance(2)
    assert bad() == [0, 1, 0]
    server.clocks.advance(4)
    assert bad() == [1, 1, 0]
    assert server.objective()["bad_by_cause"]["overdue"] == 1
    server.first_token(begun)  # it lives: only its end is to come
    assert bad() == [0, 0, 0]
    server.clocks.advance(16)
    assert bad() == [0, 0, 1]
    server.end(begun, first_token_ns=begun.arrived_ns + 6 * S)
    assert bad() == [0, 1, 1]  # late twice; it was answered after all, so it was available
    assert [server.objective(index)["good"] for index in range(3)] == [1, 0, 0]


def test_a_request_that_hangs_and_fails_counts_once(tmp_path: Path):
    server = Server(tmp_path, "availability > 99%")
    begun = server.begin()
    server.clocks.advance(30)
    assert server.objective()["bad"] == 1
    server.end(begun, outcome=Outcome.FAILED)
    assert server.objective()["bad"] == 1
    assert server.objective()["bad_by_cause"]["errored"] == 1


def test_a_record_that_never_comes_is_forgotten(tmp_path: Path):
    server = Server(tmp_path, "availability > 99%")
    server.begin()
    server.clocks.advance(3590)
    assert server.objective()["bad"] == 1
    server.clocks.advance(20)
    assert server.objective()["bad"] == 0
    assert not server.compliance.book.running


def test_only_requests_of_the_scope_are_overdue(tmp_path: Path):
    server = Server(tmp_path, "availability > 99% tenant=acme priority=high adapter=support")
    server.begin(tenant="acme", priority=-1)
    server.begin(tenant="beta", priority=-1, adapter="support")
    server.clocks.advance(20)
    assert server.objective()["bad"] == 0
    server.begin(tenant="acme", priority=-1, adapter="support")
    server.clocks.advance(20)
    assert server.objective()["bad"] == 1


def test_goodput_is_a_rate(tmp_path: Path):
    server = Server(tmp_path, "p99 ttft < 100 ms")
    for _ in range(100):
        server.end(completion_tokens=20)
        server.end(first_token_ns=server.clocks.ns + S, completion_tokens=20)
        server.end(outcome=Outcome.REFUSED)
        server.end(outcome=Outcome.LEFT)
        server.clocks.advance(1)
    server.compliance.tick()
    goodput = report(server.compliance)["goodput"]["5m"]
    assert goodput["requests_per_s"] == pytest.approx(1, rel=0.02)
    assert goodput["tokens_per_s"] == pytest.approx(20, rel=0.02)
    assert goodput["counted_requests_per_s"] == pytest.approx(2, rel=0.02)
    assert goodput["share"] == 0.5
