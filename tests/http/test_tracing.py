"""Traces of real requests: through the front end and the engine, in one trace and without a gap."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import pytest

from jaxserve.config import TracingConfig
from jaxserve.http.observer.reporter import NoReporter
from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.telemetry.tracing.context import parse_traceparent
from jaxserve.telemetry.tracing.spans import Place, spans_of
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import CONFIG, Front, expected, front

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"
URL = "/v1/completions"
TRACING = TracingConfig(endpoint="http://127.0.0.1:1", sample_ratio=0.5)


class Records(NoReporter):
    """Keeps the records of requests."""

    def __init__(self) -> None:
        self.ended_records: list[RequestRecord] = []

    def ended(self, record: RequestRecord) -> None:
        self.ended_records.append(record)

    def take(self) -> RequestRecord:
        """The one record since the last."""
        (record,) = self.ended_records
        self.ended_records.clear()
        return record


@pytest.fixture(scope="module")
def records() -> Records:
    return Records()


@pytest.fixture(scope="module")
def traced(records: Records) -> Iterator[Front]:
    """An application that traces, over the fake engine."""
    with front(reporter=records, tracing=TRACING) as made:
        yield made


def body(**values) -> dict:
    """A completion request."""
    return {"prompt": "hello", "max_tokens": 4, "seed": 1, "ignore_eos": True} | values


@pytest.mark.parametrize("name", ["traceparent", "TRACEPARENT", "TraceParent"])
def test_the_caller_s_trace_goes_on(traced: Front, records: Records, name: str) -> None:
    headers = {name: GOOD, "TraceState": "a=b"}
    response = traced.post(URL, body(), headers=headers)
    record = records.take()
    assert response.headers["traceparent"] == f"00-{TRACE}-{record.span_id}-01"
    assert response.headers["x-request-id"] == record.request_id
    assert (record.trace_id, record.parent_id) == (TRACE, SPAN)
    assert (record.trace_flags, record.tracestate, record.sampled) == (1, "a=b", True)
    assert record.sequences[0].traceparent == response.headers["traceparent"]
    assert {span.trace_id for span in spans_of(record)} == {TRACE}


def test_a_caller_that_keeps_nothing_is_followed(traced: Front, records: Records) -> None:
    response = traced.post(URL, body(), headers={"traceparent": GOOD[:-2] + "00"})
    assert response.headers["traceparent"].endswith("-00")
    assert not records.take().sampled


@pytest.mark.parametrize("text", ["", "garbage", f"00-{'0' * 32}-{SPAN}-01", GOOD.upper(), "ü"])
def test_a_malformed_context_is_ignored(traced: Front, records: Records, text: str) -> None:
    response = traced.post(URL, body(), headers={"traceparent": text.encode("utf-8")})
    assert response.status_code == 200
    record = records.take()
    assert record.trace_id == record.request_id  # so that one number finds both
    assert (record.parent_id, record.trace_flags) == ("", -1)
    context = parse_traceparent(response.headers["traceparent"])
    assert context is not None
    assert (context.trace_id, context.sampled) == (record.trace_id, record.sampled)


def test_own_traces_are_kept_by_ratio(traced: Front, records: Records) -> None:
    for _ in range(60):
        traced.post(URL, body(max_tokens=1))
    kept = sum(record.sampled for record in records.ended_records)
    records.ended_records.clear()
    assert 10 < kept < 50


@pytest.mark.parametrize(
    ("path", "values", "status", "last"),
    [
        (URL, {"prompt": "x" * 1000}, 400, "tokenize"),
        (URL, {"max_tokens": -1}, 400, "tokenize"),
        (URL, {"model": "nobody"}, 404, "receive"),
        (URL, {"n": 3}, 200, "detokenize"),
        (URL, {"stream": True}, 200, "detokenize"),
        (URL, {"prompt": ["a", "b"], "best_of": 2}, 200, "detokenize"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, 200, None),
        ("/v1/responses", {"input": "hi"}, 200, None),
    ],
)
def test_whatever_comes_of_it_it_is_told_without_a_gap(
    traced: Front, records: Records, path: str, values: dict, status: int, last: str | None
) -> None:
    asked = body(**values) if path == URL else {"max_tokens": 3} | values
    asked = {"max_output_tokens": 3} | values if path == "/v1/responses" else asked
    assert traced.post(path, asked).status_code == status
    record = records.take()
    root, *children = spans_of(record)
    mine = [span for span in children if span.parent_id == root.span_id]
    assert last is None or mine[-1].name == last
    assert mine[0].start_ns == root.start_ns and max(s.end_ns for s in mine) == root.end_ns
    assert root.error is None and root.attributes["http.response.status_code"] == status
    if "n" in values:
        assert [span.name for span in mine[4:-1]] == ["choice 0", "choice 1", "choice 2"]


def test_embeddings_are_traced_as_one() -> None:
    records = Records()
    config = CONFIG.__class__(
        **{name: getattr(CONFIG, name) for name in ("model", "cache", "scheduler", "http")},
        embeddings=CONFIG.embeddings.__class__(model="fake-embedder"),
    )
    with front(config=config, reporter=records, tracing=TRACING) as made:
        response = made.post("/v1/embeddings", {"input": ["a", "b", "c"]})
        assert response.status_code == 200, response.text
    spans = spans_of(records.take())
    assert [span.name for span in spans[1:]][-3:] == ["queue", "embed", "detokenize"]
    assert spans[0].attributes["gen_ai.operation.name"] == "embeddings"
    assert {span.trace_id for span in spans} == {spans[0].trace_id}


def test_a_client_that_leaves_is_no_failure(traced: Front, records: Records) -> None:
    async def leave() -> None:
        task = asyncio.create_task(traced.http.post(URL, json=body(max_tokens=200)))
        while not traced.client.num_streams:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while not records.ended_records:
            await asyncio.sleep(0.001)

    traced.run(leave())
    record = records.take()
    root, *children = spans_of(record)
    assert record.outcome in (Outcome.LEFT, Outcome.DONE) and root.error is None
    assert children[-1].end_ns == root.end_ns


def test_the_children_cover_99_percent_of_1000_requests(traced: Front, records: Records) -> None:
    windows: dict[str, tuple[int, int]] = {}

    async def ask(number: int) -> None:
        before_ns = time.monotonic_ns()
        values = body(prompt=f"request {number}", max_tokens=1 + number % 7, n=1 + number % 3)
        response = await traced.http.post(URL, json=values)
        assert response.status_code == 200
        windows[response.headers["x-request-id"]] = before_ns, time.monotonic_ns()

    async def storm() -> None:
        gate = asyncio.Semaphore(50)

        async def one(number: int) -> None:
            async with gate:
                await ask(number)

        await asyncio.gather(*(one(number) for number in range(1000)))

    traced.run(storm())
    assert len(records.ended_records) == 1000
    least = 1.0
    for record in records.ended_records:
        root, *children = spans_of(record)
        before_ns, after_ns = windows[record.request_id]
        assert before_ns <= root.start_ns < root.end_ns <= after_ns  # it says no more than was
        edges = sorted((s.start_ns, s.end_ns) for s in children if s.parent_id == root.span_id)
        now_ns, covered_ns = root.start_ns, 0
        for start_ns, end_ns in edges:
            covered_ns += max(0, end_ns - max(now_ns, start_ns))
            now_ns = max(now_ns, end_ns)
        least = min(least, covered_ns / (root.end_ns - root.start_ns))
        names = {span.name.partition(" ")[0] for span in children}
        assert {"receive", "tokenize", "queue", "prefill", "detokenize"} <= names
        engine = [span for span in children if span.place is Place.ENGINE]
        assert all(root.start_ns <= s.start_ns <= s.end_ns <= root.end_ns for s in engine)
    records.ended_records.clear()
    assert least >= 0.99


@pytest.mark.parametrize("stream", [False, True])
def test_contents_are_in_spans_where_they_are_asked_for_only(stream: bool) -> None:
    records = Records()
    tracing = TracingConfig(endpoint="http://127.0.0.1:1", record_content=True)
    ask = body(prompt="my secret", max_tokens=6, n=2, stream=stream)
    with front(reporter=records, tracing=tracing) as made:
        made.post(URL, ask)
    record = records.take()
    attributes = spans_of(record)[0].attributes
    (asked,) = json.loads(str(attributes["gen_ai.input.messages"]))
    assert asked["parts"] == [{"type": "text", "content": "my secret"}]
    answered = json.loads(str(attributes["gen_ai.output.messages"]))
    prompt = ByteTokenizer().encode("my secret", add_special_tokens=True)
    for choice, answer in enumerate(answered):
        _, text = expected(prompt, choice, seed=1, max_tokens=6, ignore_eos=True)
        assert answer["parts"][0]["content"] == text and answer["finish_reason"] == "length"
    with front(reporter=records, tracing=TRACING) as made:
        made.post(URL, ask)
    assert "secret" not in repr(spans_of(records.take()))


def test_the_answer_s_id_is_in_the_span(traced: Front, records: Records) -> None:
    answer = traced.post(URL, body()).json()
    assert spans_of(records.take())[0].attributes["gen_ai.response.id"] == answer["id"]


def test_with_tracing_off_the_context_is_still_passed_on() -> None:
    records = Records()
    with front(reporter=records) as made:
        first = made.post(URL, body(), headers={"traceparent": GOOD})
        assert first.headers["traceparent"].startswith(f"00-{TRACE}-")
        assert first.headers["traceparent"].endswith("-01")
        second = made.post(URL, body())
        assert second.headers["traceparent"].endswith("-00")
        assert isinstance(made.get("/v1/models"), httpx.Response)
        assert "traceparent" not in made.get("/v1/models").headers
