"""A request that has ended as spans: built once, from the times in its record.

    chat MODEL ─┬─ receive      its body came
                ├─ admit        keys, limits, the queue's length
                ├─ tokenize     the template, and the tokens
                ├─ submit       the rate limit's second look, and the road to the engine
                ├─ queue        until it had a row      ┐ in the engine's process; where a request
                ├─ prefill      until its first token   │ has several choices, below a span for
                ├─ decode       until its last          ┘ each of them
                └─ detokenize   what was left to be made text, and sent to the last byte

The children follow each other without a gap, so that they add up to the request. What else it
waited for (a replay, an adapter, a grammar, a preemption) is a span inside of the one it happened
in. Texts to embed are one "queue" and one "embed" together.

Plain data: `export` makes OpenTelemetry's of it. Span ids follow from the request's, so that a
record that comes twice has the same spans. Times stay monotonic here.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jaxserve.protocol.messages import Interval, SequenceRecord
from jaxserve.protocol.records import RequestRecord
from jaxserve.telemetry import semconv
from jaxserve.telemetry.tracing.attributes import request_attributes, sequence_attributes
from jaxserve.telemetry.tracing.context import parse_traceparent
from jaxserve.telemetry.tracing.sampling import FAILURES

#: Of one request, choices that have spans of their own.
MAX_CHOICES = 64

Value = str | bool | int | float | Sequence[str]


class Place(enum.Enum):
    """Which process did what a span says."""

    FRONT_END = "http"
    ENGINE = "engine"


@dataclass(slots=True, kw_only=True)
class Span:
    """One span.

    Attributes:
        trace_id, span_id, parent_id: hexadecimal; the parent is empty for a trace's first span.
        start_ns, end_ns: CLOCK_MONOTONIC.
        place, pid: the process; pid 0 where it is not known.
        is_request: of the request itself, whose parent is in the caller's process.
        flags: of the parent's context; tracestate: of all.
        error: what went wrong; None where nothing did, or the request itself was at fault.
    """

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start_ns: int
    end_ns: int
    place: Place = Place.FRONT_END
    pid: int = 0
    is_request: bool = False
    flags: int = 1
    tracestate: str = ""
    error: str | None = None
    attributes: Mapping[str, Value] = field(default_factory=dict)


def spans_of(record: RequestRecord) -> list[Span]:
    """All spans of a request, its own first, parents before their children."""
    operation = semconv.OPERATIONS.get(record.route, record.route)
    failed = record.outcome in FAILURES
    root = Span(
        trace_id=record.trace_id,
        span_id=record.span_id,
        parent_id=record.parent_id,
        name=f"{operation} {record.model}".rstrip(),
        start_ns=record.arrived_ns,
        end_ns=max(record.done_ns, record.arrived_ns),
        is_request=True,
        flags=max(record.trace_flags, 0),
        tracestate=record.tracestate,
        error=(record.error or record.outcome.value) if failed else None,
        attributes=request_attributes(record, operation),
    )
    return [root, *_Children(record, root).make()]


class _Children:
    """Makes the spans below a request's own."""

    def __init__(self, record: RequestRecord, root: Span) -> None:
        self._record = record
        self._root = root
        self._now_ns = root.start_ns  # up to here the request is told
        self._seed = hashlib.blake2b(root.span_id.encode(), digest_size=8)

    def make(self) -> list[Span]:
        """The spans, parents before their children."""
        made = [*self._phases()]
        front_end = [span for span in made if span.place is Place.FRONT_END]
        return made + [
            self._inside(interval, front_end, self._root, Place.FRONT_END, 0)
            for interval in self._record.spans
        ]

    def _phases(self) -> Iterator[Span]:
        """The request from its first byte to its last."""
        record = self._record
        phases = [
            ("receive", record.read_ns),
            ("admit", record.admitted_ns),
            ("tokenize", record.tokenized_ns),
            ("submit", record.submitted_ns),
        ]
        for name, end_ns in phases:
            if not end_ns:  # it came no further
                for span in self._phase(name, self._root.end_ns):
                    span.error = self._root.error
                    yield span
                return
            yield from self._phase(name, end_ns)
        if record.sequences:
            yield from self._in_engine()
        else:  # the engine has not said its part
            reached = "decode" if record.first_token_ns else "queue"
            yield from self._phase(reached, self._root.end_ns)
        yield from self._phase("detokenize", self._root.end_ns)

    def _phase(self, name: str, end_ns: int) -> Iterator[Span]:
        """The next stretch of the request, if it took any time."""
        start_ns, end_ns = self._now_ns, min(end_ns, self._root.end_ns)
        if end_ns > start_ns:
            self._now_ns = end_ns
            yield self._span(name, start_ns, end_ns, self._root)

    # ------------------------------------------------------------------ in the engine

    def _in_engine(self) -> Iterator[Span]:
        """What the engine did with each choice, from the submission to the last one's end."""
        record, start_ns = self._record, self._now_ns
        sequences = sorted(record.sequences, key=lambda sequence: sequence.choice)
        end_ns = self._clamp(max(sequence.done_ns for sequence in sequences))
        if record.texts:
            yield from self._texts(sequences, start_ns, end_ns)
        elif len(sequences) == 1 and record.asked.choices == 1:
            yield from self._choice(sequences[0], self._root, start_ns)
        else:
            for sequence in sequences[:MAX_CHOICES]:
                done_ns = self._clamp(sequence.done_ns)
                parent = self._engine_span(
                    f"choice {sequence.choice}", start_ns, done_ns, self._root, sequence
                )
                yield parent
                yield from self._choice(sequence, parent, start_ns)
        self._now_ns = end_ns

    def _choice(self, sequence: SequenceRecord, parent: Span, start_ns: int) -> Iterator[Span]:
        """One choice's way through the engine."""
        made: list[Span] = []
        done_ns = self._clamp(sequence.done_ns)
        ends = {
            "queue": sequence.scheduled_ns,
            "prefill": sequence.first_token_ns,
            "decode": sequence.done_ns,
        }
        for name, at_ns in ends.items():
            end_ns = min(self._clamp(at_ns), done_ns) if at_ns else done_ns
            if end_ns > start_ns:
                made.append(self._engine_span(name, start_ns, end_ns, parent, sequence))
                made[-1].attributes = sequence_attributes(name, sequence)
                start_ns = end_ns
        yield from made
        for interval in sequence.intervals:
            yield self._inside(interval, made, parent, Place.ENGINE, sequence.pid)

    def _texts(self, sequences: list[SequenceRecord], start_ns: int, end_ns: int) -> Iterator[Span]:
        """Texts are very many, and all alike."""
        begun = [sequence.scheduled_ns for sequence in sequences if sequence.scheduled_ns]
        split_ns = self._clamp(min(begun, default=end_ns))
        for name, start, end in (("queue", start_ns, split_ns), ("embed", split_ns, end_ns)):
            if end > start:
                yield self._engine_span(name, start, end, self._root, sequences[0])

    def _engine_span(
        self, name: str, start_ns: int, end_ns: int, parent: Span, sequence: SequenceRecord
    ) -> Span:
        """A span that the engine's process vouches for: in the trace that it was told."""
        span = self._span(name, start_ns, end_ns, parent)
        span.place, span.pid = Place.ENGINE, sequence.pid
        told = parse_traceparent(sequence.traceparent)
        if told is not None:
            span.trace_id = told.trace_id
            if parent is self._root:
                span.parent_id = told.span_id
        return span

    # ------------------------------------------------------------------ spans

    def _inside(
        self, interval: Interval, made: Sequence[Span], parent: Span, place: Place, pid: int
    ) -> Span:
        """A wait, in the span that it began in."""
        start_ns, end_ns = self._within(interval.start_ns), self._within(interval.end_ns)
        for span in made:
            if span.start_ns <= start_ns < span.end_ns:
                parent = span
                break
        span = self._span(interval.kind, start_ns, max(start_ns, end_ns), parent)
        span.place, span.pid, span.trace_id = place, pid, parent.trace_id
        return span

    def _span(self, name: str, start_ns: int, end_ns: int, parent: Span) -> Span:
        self._seed.update(b"+")
        return Span(
            trace_id=self._root.trace_id,
            span_id=self._seed.hexdigest(),
            parent_id=parent.span_id,
            name=name,
            start_ns=start_ns,
            end_ns=end_ns,
            tracestate=self._root.tracestate,
        )

    def _clamp(self, at_ns: int) -> int:
        """A time of the engine's, not before what is told and not after the request's end."""
        return min(max(at_ns, self._now_ns), self._root.end_ns)

    def _within(self, at_ns: int) -> int:
        return min(max(at_ns, self._root.start_ns), self._root.end_ns)
