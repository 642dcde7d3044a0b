"""Spans of records: the children add up to the request, whatever came of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.protocol.messages import Interval
from jaxserve.protocol.records import Asked, Outcome
from jaxserve.telemetry.tracing.spans import MAX_CHOICES, Place, Span, spans_of
from tests.telemetry.tracing.records import PARENT, SPAN, TRACE, record, sequence


def told(spans: list[Span]) -> list[tuple[str, int, int]]:
    """Names and times."""
    return [(span.name, span.start_ns, span.end_ns) for span in spans]


def test_the_children_of_a_request_follow_each_other() -> None:
    root, *children = spans_of(record(parent_id=PARENT, trace_flags=1, tracestate="a=b"))
    assert (root.name, root.start_ns, root.end_ns) == ("chat smol", 100, 2000)
    assert (root.trace_id, root.span_id, root.parent_id) == (TRACE, SPAN, PARENT)
    assert told(children) == [
        ("receive", 100, 200),
        ("admit", 200, 300),
        ("tokenize", 300, 450),
        ("submit", 450, 500),
        ("queue", 500, 700),
        ("prefill", 700, 1000),
        ("decode", 1000, 1800),
        ("detokenize", 1800, 2000),
    ]
    assert {span.parent_id for span in children} == {SPAN}
    assert {span.trace_id for span in children} == {TRACE}
    assert {span.tracestate for span in children} == {"a=b"}
    assert len({span.span_id for span in [root, *children]}) == 9
    engine = [span.name for span in children if span.place is Place.ENGINE]
    assert engine == ["queue", "prefill", "decode"]
    assert {span.pid for span in children if span.place is Place.ENGINE} == {4711}


def test_a_record_that_comes_twice_has_the_same_spans() -> None:
    assert spans_of(record()) == spans_of(record())
    other = spans_of(record(span_id="e" * 16))
    assert not {span.span_id for span in other} & {span.span_id for span in spans_of(record())}


def test_the_engine_s_spans_are_in_the_trace_that_the_engine_was_told() -> None:
    spans = spans_of(record(sequences=[sequence(traceparent=f"00-{'9' * 32}-{'8' * 16}-01")]))
    for span in spans:
        mixed = span.place is Place.ENGINE
        assert (span.trace_id == "9" * 32) == mixed
        assert (span.parent_id == "8" * 16) == mixed


def test_several_choices_have_a_span_each() -> None:
    ends = [1700, 1900, 1800]
    sequences = [
        sequence(choice=choice, done_ns=done_ns) for choice, done_ns in reversed([*enumerate(ends)])
    ]
    root, *children = spans_of(record(sequences=sequences, asked=Asked(choices=3)))
    choices = [span for span in children if span.name.startswith("choice")]
    assert told(choices) == [
        ("choice 0", 500, 1700),
        ("choice 1", 500, 1900),
        ("choice 2", 500, 1800),
    ]
    assert {span.parent_id for span in choices} == {root.span_id}
    for choice in choices:
        below = [span for span in children if span.parent_id == choice.span_id]
        assert [span.name for span in below] == ["queue", "prefill", "decode"]
        assert (below[0].start_ns, below[-1].end_ns) == (choice.start_ns, choice.end_ns)
    assert told(children)[-1] == ("detokenize", 1900, 2000)


def test_very_many_choices_and_texts_have_few_spans() -> None:
    many = [sequence(choice=choice) for choice in range(1000)]
    assert len(spans_of(record(sequences=many, asked=Asked(choices=1000)))) == 6 + 4 * MAX_CHOICES
    texts = [sequence(scheduled_ns=600 + i, done_ns=900 + i) for i in range(1000)]
    spans = spans_of(record(route="/v1/embeddings", sequences=texts, texts=1000, submitted_ns=450))
    assert spans[0].name == "embeddings smol"
    assert told(spans)[4:] == [
        ("queue", 450, 600),
        ("embed", 600, 1899),
        ("detokenize", 1899, 2000),
    ]


def test_what_it_waited_for_is_inside_of_what_it_happened_in() -> None:
    waits = [
        ("held", 510, 550),
        ("adapter", 550, 600),
        ("grammar", 600, 640),
        ("replay", 640, 660),
        ("preempted", 750, 800),
        ("swapped", 1100, 1200),
    ]
    intervals = [Interval(kind=kind, start_ns=start, end_ns=end) for kind, start, end in waits]
    front = [Interval(kind="check", start_ns=310, end_ns=320)]
    spans = spans_of(record(sequences=[sequence(intervals=intervals)], spans=front))
    by_id = {span.span_id: span for span in spans}
    kinds = {kind for kind, _, _ in waits}
    engine = [span for span in spans if span.name in kinds]
    inside = {span.name: by_id[span.parent_id].name for span in [*engine, spans[-1]]}
    assert inside == {
        "held": "queue",
        "adapter": "queue",
        "grammar": "queue",
        "replay": "queue",
        "preempted": "prefill",
        "swapped": "decode",
        "check": "tokenize",
    }
    assert {(span.place, span.pid) for span in engine} == {(Place.ENGINE, 4711)}
    assert told(engine) == waits


@pytest.mark.parametrize(
    ("missing", "last"),
    [
        (("read_ns", "admitted_ns", "tokenized_ns", "submitted_ns"), "receive"),
        (("admitted_ns", "tokenized_ns", "submitted_ns"), "admit"),
        (("tokenized_ns", "submitted_ns"), "tokenize"),
        (("submitted_ns",), "submit"),
        ((), "queue"),
    ],
)
def test_a_request_that_failed_early_ends_in_what_it_failed_in(missing, last) -> None:
    values = dict.fromkeys([*missing, "first_token_ns"], 0)
    failed = record(
        **values,
        sequences=[],
        status=503,
        outcome=Outcome.SHED,
        error="too many wait",
        error_code="overloaded",
    )
    root, *children = spans_of(failed)
    assert children[-1].name == last
    assert children[-1].end_ns == 2000
    assert root.error == "too many wait"
    assert root.attributes["error.type"] == "overloaded"
    assert root.attributes["http.response.status_code"] == 503


def test_a_refused_sequence_waited_until_its_end() -> None:
    refused = sequence(scheduled_ns=0, first_token_ns=0, done_ns=560)
    spans = spans_of(record(sequences=[refused], first_token_ns=0))
    assert told(spans)[5:] == [("queue", 500, 560), ("detokenize", 560, 2000)]


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.LIMITED, Outcome.LEFT])
def test_a_request_s_own_fault_is_no_error_of_the_server(outcome: Outcome) -> None:
    assert spans_of(record(outcome=outcome, error="no such thing"))[0].error is None


def test_the_attributes_have_the_conventions_names() -> None:
    asked = Asked(
        max_tokens=9, temperature=0.0, top_p=0.5, top_k=3, seed=0, stop=["x"], choices=2,
        frequency_penalty=0.1, presence_penalty=-0.1,
    )  # fmt: skip
    whole = record(
        asked=asked, response_id="chatcmpl-1", streamed=True, cached_tokens=4, reasoning_tokens=2,
        tenant="acme", key="laptop", user="u1", adapter="law", priority=-1,
    )  # fmt: skip
    assert spans_of(whole)[0].attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "jaxserve",
        "gen_ai.request.model": "smol",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.frequency_penalty": 0.1,
        "gen_ai.request.presence_penalty": -0.1,
        "gen_ai.request.seed": 0,
        "gen_ai.request.stop_sequences": ["x"],
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "smol",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": 920e-9,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "user.id": "u1",
        "jaxserve.request_id": "d" * 32,
        "jaxserve.adapter": "law",
        "jaxserve.tenant": "acme",
        "jaxserve.key": "laptop",
        "jaxserve.outcome": "done",
        "jaxserve.priority": -1,
    }


TIMES = st.integers(0, 3000)


@given(st.data())
def test_whatever_the_times_the_children_partition_the_request(data: st.DataObject) -> None:
    names = ("read_ns", "admitted_ns", "tokenized_ns", "submitted_ns", "first_token_ns", "done_ns")
    own = {name: data.draw(TIMES) for name in names}
    inner = ("queued_ns", "scheduled_ns", "first_token_ns", "done_ns")
    sequences = [
        sequence(
            choice=choice,
            intervals=[Interval(kind="x", start_ns=data.draw(TIMES), end_ns=data.draw(TIMES))],
            **{name: data.draw(TIMES) for name in inner},
        )
        for choice in range(data.draw(st.integers(0, 3)))
    ]
    texts = data.draw(st.integers(0, 1))
    root, *children = spans_of(record(**own, sequences=sequences, texts=texts))
    assert all(root.start_ns <= s.start_ns <= s.end_ns <= root.end_ns for s in children)
    ids = {span.span_id for span in [root, *children]}
    assert len(ids) == 1 + len(children) and all(s.parent_id in ids for s in children)
    assert covered(root, children) == root.end_ns - root.start_ns


def covered(root: Span, spans: list[Span]) -> int:
    """Of a request's time, what its children say."""
    now_ns, total = root.start_ns, 0
    mine = [span for span in spans if span.parent_id == root.span_id]
    for span in sorted(mine, key=lambda span: span.start_ns):
        total += max(span.end_ns - max(span.start_ns, now_ns), 0)
        now_ns = max(now_ns, span.end_ns)
    return total
