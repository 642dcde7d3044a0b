"""Where a request's time went: the stretches follow each other, and are the whole."""

from __future__ import annotations

from jaxserve.protocol.messages import Interval, SequenceRecord
from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.telemetry.waterfall import bars, covered, document

MS = 1_000_000
T0 = 5_000 * MS


def at(ms: float) -> int:
    """So many milliseconds after the request's arrival."""
    return T0 + int(ms * MS)


def sequence(scheduled: float, first: float, done: float, **values) -> SequenceRecord:
    """A sequence's times."""
    return SequenceRecord(
        queued_ns=at(5),
        scheduled_ns=at(scheduled) if scheduled else 0,
        first_token_ns=at(first) if first else 0,
        done_ns=at(done),
        **values,
    )


def whole(**values) -> RequestRecord:
    """A request that was answered."""
    return RequestRecord(
        **{
            "request_id": "ab" * 16,
            "route": "/v1/chat/completions",
            "arrived_ns": T0,
            "read_ns": at(1),
            "admitted_ns": at(2),
            "tokenized_ns": at(3.5),
            "submitted_ns": at(4),
            "first_token_ns": at(31),
            "done_ns": at(101),
            "sequences": [sequence(10, 30, 100)],
        }
        | values
    )


def told(record: RequestRecord) -> list[tuple[str, float, float]]:
    """Names and milliseconds."""
    return [(b["name"], b["start_ms"], b["end_ms"]) for b in document(record)["bars"]]


def test_seven_stretches_are_the_whole():
    record = whole()
    assert told(record) == [
        ("receive", 0, 1),
        ("admit", 1, 2),
        ("tokenize", 2, 4),
        ("queue", 4, 10),
        ("prefill", 10, 30),
        ("decode", 30, 100),
        ("detokenize", 100, 101),
    ]
    doc = document(record)
    assert doc["covered"] == 1
    assert (doc["ttft_ms"], doc["total_ms"]) == (31, 101)


def test_stamps_of_two_processes_may_cross_and_no_stretch_is_lost():
    record = whole(submitted_ns=at(10.2))  # stamped after the engine had begun
    assert told(record)[2:5] == [
        ("tokenize", 2, 10.2),
        ("queue", 10.2, 10.2),
        ("prefill", 10.2, 30),
    ]
    assert document(record)["covered"] == 1


def test_choices_have_lanes_and_what_they_waited_for_lies_inside():
    waited = Interval(kind="preempted", start_ns=at(40), end_ns=at(60))
    record = whole(
        sequences=[sequence(10, 30, 80), sequence(11, 31, 100, intervals=[waited])],
        spans=[Interval(kind="grammar", start_ns=at(2), end_ns=at(3))],
    )
    drawn = bars(record)
    assert {bar.lane for bar in drawn} == {"request", "choice 0", "choice 1"}
    inner = [(bar.name, bar.lane) for bar in drawn if bar.depth]
    assert inner == [("preempted", "choice 1"), ("grammar", "request")]
    assert told(record)[-2][:2] == ("detokenize", 100)  # after the last of them


def test_a_refused_request_ends_where_it_was_refused():
    record = whole(
        admitted_ns=0,
        tokenized_ns=0,
        submitted_ns=0,
        first_token_ns=0,
        sequences=[],
        done_ns=at(3),
        outcome=Outcome.LIMITED,
    )
    assert told(record) == [("receive", 0, 1), ("admit", 1, 3)]
    assert document(record)["ttft_ms"] is None
    assert document(record)["covered"] == 1


def test_one_that_never_ran_waited_to_its_end():
    record = whole(first_token_ns=0, sequences=[sequence(0, 0, 100)])
    assert told(record)[-2:] == [("queue", 4, 100), ("detokenize", 100, 101)]


def test_one_of_which_the_engine_said_nothing_ends_in_front():
    record = whole(sequences=[], first_token_ns=0)
    assert told(record)[-1] == ("tokenize", 2, 4)
    assert document(record)["covered"] < 0.05


def test_times_that_go_back_are_left_out():
    record = whole(done_ns=T0 - MS)
    doc = document(record)
    assert doc["total_ms"] == 0
    assert doc["covered"] == 1
    assert all(bar["end_ms"] >= bar["start_ms"] for bar in doc["bars"])


def test_coverage_counts_overlaps_once():
    drawn = bars(whole(sequences=[sequence(10, 30, 100), sequence(10, 50, 100)]))
    assert covered(drawn, T0, at(101)) == 1
    assert covered([], T0, at(101)) == 0
