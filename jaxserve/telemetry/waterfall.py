"""A request's time, stretch by stretch, as the console draws it.

    receive → admit → tokenize → queue → prefill → decode → detokenize

Each ends where the next begins, so that together they are the whole. What else a sequence waited
for lies below the stretch that it lengthened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One stretch.

    Attributes:
        lane: "request", "choice 0", "choice 1", …
        depth: 0 for the seven, 1 for what lies inside of them.
    """

    name: str
    lane: str
    start_ns: int
    end_ns: int
    depth: int = 0


def bars(record: RequestRecord) -> list[Bar]:
    """The stretches of a request that has ended, in order; what has not happened is not there."""
    made = _in_front(record)
    for index, sequence in enumerate(record.sequences):
        lane = "request" if len(record.sequences) == 1 else f"choice {index}"
        made += _in_engine(record, sequence, lane)
    if record.sequences:
        last_ns = max(sequence.done_ns for sequence in record.sequences)
        if last_ns:
            made.append(_bar("detokenize", "request", last_ns, max(record.done_ns, last_ns)))
    made += [
        _bar(span.kind, "request", span.start_ns, span.end_ns, depth=1) for span in record.spans
    ]
    return [bar for bar in made if bar.start_ns and bar.end_ns >= bar.start_ns]


def document(record: RequestRecord) -> dict[str, Any]:
    """What the console shows of a request; times in milliseconds since its arrival."""
    start_ns = record.arrived_ns
    end_ns = max(record.done_ns, start_ns)
    drawn = bars(record)
    return {
        "id": record.request_id,
        "trace_id": record.trace_id,
        "route": record.route,
        "model": record.model,
        "adapter": record.adapter,
        "tenant": record.tenant,
        "key": record.key,
        "user": record.user,
        "priority": record.priority,
        "status": record.status,
        "outcome": str(record.outcome),
        "error_code": record.error_code,
        "error": record.error,
        "streamed": record.streamed,
        "finish_reasons": record.finish_reasons,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "preemptions": sum(sequence.preemptions for sequence in record.sequences),
        "replays": max((sequence.replays for sequence in record.sequences), default=0),
        "ttft_ms": (record.first_token_ns - start_ns) / 1e6 if record.first_token_ns else None,
        "total_ms": (end_ns - start_ns) / 1e6,
        "covered": covered(drawn, start_ns, end_ns),
        "bars": [
            {
                "name": bar.name,
                "lane": bar.lane,
                "depth": bar.depth,
                "start_ms": (bar.start_ns - start_ns) / 1e6,
                "end_ms": (bar.end_ns - start_ns) / 1e6,
            }
            for bar in drawn
        ],
    }


def covered(drawn: list[Bar], start_ns: int, end_ns: int) -> float:
    """The share of the time from start to end that lies in some stretch; 1 for no time at all."""
    if end_ns <= start_ns:
        return 1.0
    total_ns, reached_ns = 0, start_ns
    for bar in sorted(drawn, key=lambda bar: bar.start_ns):
        begin_ns = max(bar.start_ns, reached_ns)
        if (stop_ns := min(bar.end_ns, end_ns)) > begin_ns:
            total_ns += stop_ns - begin_ns
            reached_ns = stop_ns
    return total_ns / (end_ns - start_ns)


def _in_front(record: RequestRecord) -> list[Bar]:
    """What the HTTP process did before the engine had it.

    Of a request that went no further, the last stretch goes to its end.
    """
    ends = [
        ("receive", record.read_ns),
        ("admit", record.admitted_ns),
        ("tokenize", record.submitted_ns or (record.tokenized_ns if record.sequences else 0)),
    ]
    return _chain(ends, "request", record.arrived_ns, record.done_ns)


def _in_engine(record: RequestRecord, sequence: SequenceRecord, lane: str) -> list[Bar]:
    submitted_ns = record.submitted_ns or record.tokenized_ns or sequence.queued_ns
    ends = [
        ("queue", sequence.scheduled_ns),
        ("prefill", sequence.first_token_ns),
        ("decode", sequence.done_ns),
    ]
    made = _chain(ends, lane, submitted_ns, sequence.done_ns or record.done_ns)
    made += [
        _bar(interval.kind, lane, interval.start_ns, interval.end_ns, depth=1)
        for interval in sequence.intervals
    ]
    return made


def _chain(ends: list[tuple[str, int]], lane: str, start_ns: int, last_ns: int) -> list[Bar]:
    """Stretches that follow each other; the first that has no end goes to the last moment.

    Two processes stamp the times, so one may be a little before the one that it follows: the
    stretch between them then took no time.
    """
    made = []
    for name, end_ns in ends:
        stop_ns = max(end_ns or last_ns, start_ns)
        made.append(_bar(name, lane, start_ns, stop_ns))
        if not end_ns:
            break
        start_ns = stop_ns
    return made


def _bar(name: str, lane: str, start_ns: int, end_ns: int, depth: int = 0) -> Bar:
    return Bar(name=name, lane=lane, start_ns=start_ns, end_ns=end_ns, depth=depth)
